"""The plan of a recipe on a topology: what its train step needs and how fast it can be."""

import collections
import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType

from capvl.data.images.buckets import Bucket
from capvl.parallel.rules import MESH_AXES, fsdp_advice
from capvl.planning import ahead
from capvl.planning.roofline import Roofline, roofline
from capvl.planning.topology import Topology
from capvl.planning.work import Cost, Program


@dataclasses.dataclass(frozen=True)
class Plan:
    """One recipe on one topology; everything is of one chip and one step unless said.

    Attributes:
      topology: where.
      source: "compiled" by the TPU compiler, or "paper" for what can be said without it.
      mesh: (replica, fsdp, tensor).
      batch: examples over all chips.
      remat, micro_batches: as in the recipe.
      analytic_flops: matmul FLOPs of the objective's own formula, nothing recomputed.
      buckets: that batches come in, as often each as the others, a compilation each; None for the model's own size.
      costs: counted work of a step in each bucket.
      arguments, temporaries, total: bytes of HBM, in the bucket that needs most; on paper without what the compiler
        needs in between.
      xla_bytes: XLA's own count of bytes, loop bodies once, views of memory as if they were copies, mean over the
        buckets; 0 on paper.
      seconds: of all compilations; 0 on paper.
      advice: a sentence where the mesh leaves weights whole, or "".
    """

    topology: Topology
    source: str
    mesh: tuple[int, int, int]
    batch: int
    remat: str
    micro_batches: int
    analytic_flops: float
    buckets: tuple[Bucket | None, ...]
    costs: tuple[Cost, ...]
    arguments: float
    temporaries: float
    total: float
    xla_bytes: float = 0.0
    seconds: float = 0.0
    advice: str = ""

    @property
    def cost(self) -> Cost:
        """Counted work, mean over the buckets."""
        mean = Cost()
        for cost in self.costs:
            mean.add(cost, 1 / len(self.costs))
        return mean

    @property
    def times(self) -> Roofline:
        """Roofline of the counted work, mean over the buckets."""
        return roofline(self.cost, self.topology.chip)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """A step where everything overlaps, and where nothing does; mean over the buckets."""
        found = [roofline(cost, self.topology.chip) for cost in self.costs]
        return sum(times.least for times in found) / len(found), sum(times.most for times in found) / len(found)

    @property
    def fits(self) -> bool:
        """Whether the program has room in a chip's HBM."""
        return self.total <= self.topology.chip.hbm_bytes

    @property
    def images_per_second(self) -> tuple[float, float]:
        """Of all chips: nothing overlaps, everything does."""
        least, most = self.step_seconds
        return self.batch / most, self.batch / least

    @property
    def mfu(self) -> tuple[float, float]:
        """Analytic FLOPs over the peak's, at those two speeds."""
        ideal = self.analytic_flops / self.topology.chip.flops
        least, most = self.step_seconds
        return ideal / most, ideal / least

    def values(self) -> dict:
        """Everything as plain values, for JSON."""
        chip, times, (least, most) = self.topology.chip, self.times, self.step_seconds
        return {
            "topology": self.topology.name,
            "source": self.source,
            "chips": self.topology.size,
            "hosts": self.topology.hosts,
            "mesh": dict(zip(("replica", "fsdp", "tensor"), self.mesh, strict=True)),
            "batch": self.batch,
            "batch_per_chip": self.batch / self.topology.size,
            "remat": self.remat,
            "micro_batches": self.micro_batches,
            "hbm": {
                "arguments": self.arguments,
                "temporaries": self.temporaries,
                "total": self.total,
                "capacity": chip.hbm_bytes,
                "fits": self.fits,
            },
            "flops": self.cost.flops,
            "analytic_flops": self.analytic_flops,
            "bytes": self.cost.bytes,
            "hbm_bytes": self.cost.hbm_bytes,
            "xla_bytes": self.xla_bytes,
            "compiler_cycles": self.cost.cycles,
            "seconds": dataclasses.asdict(times) | {"least": least, "most": most},
            "binds": times.binds,
            "images_per_second": list(self.images_per_second),
            "images_per_second_per_host": [rate / self.topology.hosts for rate in self.images_per_second],
            "mfu": list(self.mfu),
            "collectives": [
                {"kind": kind, "bytes": moved, "group": group, "across_slices": crosses, "times": times}
                for (kind, moved, group, crosses), times in sorted(
                    self.cost.collectives.items(), key=lambda item: -item[0][1] * item[1]
                )
            ],
            "hbm_bytes_by_operation": dict(self.cost.by_operation.most_common(20)),
            "compilations": len(self.buckets),
            "buckets": [list(bucket) for bucket in self.buckets if bucket],
            "compile_seconds": self.seconds,
            "advice": self.advice,
        }


def _plan(recipe, topology: Topology, **found) -> Plan:
    shape = recipe.mesh.shape(topology.size, topology.slices)
    blueprint = recipe.train_step().blueprint
    return Plan(
        topology,
        mesh=shape,
        advice=fsdp_advice(blueprint.axes, blueprint.shapes, AbstractMesh(shape, MESH_AXES)),
        batch=recipe.batch_size,
        remat=recipe.model.remat,
        micro_batches=recipe.micro_batches,
        analytic_flops=recipe.objective.flops(recipe.model) * recipe.batch_size / topology.size,
        buckets=recipe.buckets(),
        **found,
    )


def compiled_plan(recipe, topology: Topology) -> Plan:
    """Compiles the step of every bucket for the topology and counts its work.

    Raises:
      ahead.DoesNotFitError: the compiler found no place for it.
      UserError: mesh or batch don't fit the topology, or libtpu is missing.
    """
    found, too_large = [], []
    for bucket in recipe.buckets():
        try:
            found.append(ahead.compile_step(recipe, topology, bucket))
        except ahead.DoesNotFitError as e:
            too_large.append(e)
    if too_large:
        raise max(too_large, key=lambda e: e.needed)
    largest = max(found, key=lambda compiled: compiled.total)
    return _plan(
        recipe,
        topology,
        source="compiled",
        costs=tuple(Program(c.text, topology.size // topology.slices, topology.slices).cost for c in found),
        arguments=largest.arguments,
        temporaries=largest.temporaries,
        total=largest.total,
        xla_bytes=sum(compiled.xla_bytes for compiled in found) / len(found),
        seconds=sum(compiled.seconds for compiled in found),
    )


def paper_plan(recipe, topology: Topology) -> Plan:
    """What can be said without a compiler.

    Arguments are exact. Temporaries are the gradients and the activations that the backward pass
    keeps; HBM bytes are one write and one read of those and of the state: both are lower bounds. FLOPs are those of the
    mean bucket.
    """
    mesh = AbstractMesh(recipe.mesh.shape(topology.size, topology.slices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    step = recipe.train_step()
    each = recipe.check(mesh)
    shapes, shardings = step.state_shapes, step.state_shardings(mesh)

    def on_chip(shape, sharding) -> int:
        return math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize

    arguments = sum(jax.tree.leaves(jax.tree.map(on_chip, shapes, shardings)))
    gradients = sum(on_chip(shapes.params[k], shardings.params[k]) for k in step.trainable)
    saved = [_saved_bytes(recipe, step, each, bucket) for bucket in recipe.buckets()]
    collectives = _gradient_collectives(recipe, step, mesh, topology)
    moved = [2.0 * (kept * recipe.micro_batches + gradients + arguments) for kept in saved]
    flops = recipe.objective.flops(recipe.model) * recipe.batch_size / topology.size
    return _plan(
        recipe,
        topology,
        source="paper",
        costs=tuple(Cost(flops=flops, bytes=m, hbm_bytes=m, collectives=collectives) for m in moved),
        arguments=arguments,
        temporaries=gradients + max(saved),
        total=arguments + gradients + max(saved),
    )


def _saved_bytes(recipe, step, batch: int, bucket: Bucket | None) -> int:
    """Bytes that the backward pass of `batch` examples in a bucket keeps, but for the parameters themselves."""

    def pullback(params, batch):
        def loss(params):
            prepared = recipe.objective.prepare(batch, train=True)
            return recipe.objective.loss(step.blueprint.bind(params), prepared, jax.random.key(0))

        return jax.vjp(loss, params, has_aux=True)[1]

    params = {k: jax.ShapeDtypeStruct(s.shape, s.dtype) for k, s in step.blueprint.shapes.items()}
    kept = jax.eval_shape(pullback, params, recipe.batch_spec(bucket=bucket, batch=batch))
    sizes = {(s.shape, s.dtype) for s in params.values()}
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(kept)
        if (leaf.shape, leaf.dtype) not in sizes
    )


def _gradient_collectives(recipe, step, mesh, topology: Topology) -> collections.Counter:
    """All-reduce of gradients over replicas; gathers of bfloat16 weights, twice, and scatters over fsdp."""
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    size = width * sum(math.prod(step.blueprint.shapes[k].shape) for k in step.trainable)
    found = collections.Counter()
    replica, fsdp = mesh.shape["replica"], mesh.shape["fsdp"]
    if fsdp > 1:
        found["all-gather", size, fsdp, False] += 2 * recipe.micro_batches
        found["reduce-scatter", size, fsdp, False] += recipe.micro_batches
    if replica > 1:
        found["all-reduce", size // fsdp, replica, topology.slices > 1] += 1
    return found
