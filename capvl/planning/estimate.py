"""The plan of a recipe on a topology: what its train step needs and how fast it can be."""

import collections
import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType

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
      cost: counted work.
      arguments, temporaries, total: bytes of HBM; on paper without what the compiler needs in between.
      xla_bytes: XLA's own count of bytes, loop bodies once, views of memory as if they were copies; 0 on paper.
      seconds: of the compilation; 0 on paper.
      advice: a sentence where the mesh leaves weights whole, or "".
    """

    topology: Topology
    source: str
    mesh: tuple[int, int, int]
    batch: int
    remat: str
    micro_batches: int
    analytic_flops: float
    cost: Cost
    arguments: float
    temporaries: float
    total: float
    xla_bytes: float = 0.0
    seconds: float = 0.0
    advice: str = ""

    @property
    def times(self) -> Roofline:
        """Roofline of the counted work."""
        return roofline(self.cost, self.topology.chip)

    @property
    def fits(self) -> bool:
        """Whether the program has room in a chip's HBM."""
        return self.total <= self.topology.chip.hbm_bytes

    @property
    def images_per_second(self) -> tuple[float, float]:
        """Of all chips: nothing overlaps, everything does."""
        return self.batch / self.times.most, self.batch / self.times.least

    @property
    def mfu(self) -> tuple[float, float]:
        """Analytic FLOPs over the peak's, at those two speeds."""
        ideal = self.analytic_flops / self.topology.chip.flops
        return ideal / self.times.most, ideal / self.times.least

    def values(self) -> dict:
        """Everything as plain values, for JSON."""
        chip, times = self.topology.chip, self.times
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
            "seconds": dataclasses.asdict(times) | {"least": times.least, "most": times.most},
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
        **found,
    )


def compiled_plan(recipe, topology: Topology) -> Plan:
    """Compiles the step for the topology and counts its work.

    Raises:
      ahead.DoesNotFitError: the compiler found no place for it.
      UserError: mesh or batch don't fit the topology, or libtpu is missing.
    """
    compiled = ahead.compile_step(recipe, topology)
    program = Program(compiled.text, topology.size // topology.slices, topology.slices)
    return _plan(
        recipe,
        topology,
        source="compiled",
        cost=program.cost,
        arguments=compiled.arguments,
        temporaries=compiled.temporaries,
        total=compiled.total,
        xla_bytes=compiled.xla_bytes,
        seconds=compiled.seconds,
    )


def paper_plan(recipe, topology: Topology) -> Plan:
    """What can be said without a compiler.

    Arguments are exact. Temporaries are the gradients and the activations that the backward pass
    keeps; HBM bytes are one write and one read of those and of the state: both are lower bounds.
    """
    mesh = AbstractMesh(recipe.mesh.shape(topology.size, topology.slices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    step = recipe.train_step()
    each = recipe.check(mesh)
    shapes, shardings = jax.eval_shape(step.init_from_seed), step.state_shardings(mesh)

    def on_chip(shape, sharding) -> int:
        return math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize

    arguments = sum(jax.tree.leaves(jax.tree.map(on_chip, shapes, shardings)))
    gradients = sum(on_chip(shapes.params[k], shardings.params[k]) for k in step.trainable)
    saved = _saved_bytes(recipe, step, each)
    collectives = _gradient_collectives(recipe, step, mesh, topology)
    moved = 2.0 * (saved * recipe.micro_batches + gradients + arguments)
    flops = recipe.objective.flops(recipe.model) * recipe.batch_size / topology.size
    return _plan(
        recipe,
        topology,
        source="paper",
        cost=Cost(flops=flops, bytes=moved, hbm_bytes=moved, collectives=collectives),
        arguments=arguments,
        temporaries=gradients + saved,
        total=arguments + gradients + saved,
    )


def _saved_bytes(recipe, step, batch: int) -> int:
    """Bytes that the backward pass of `batch` examples keeps, but for the parameters themselves."""

    def pullback(params, batch):
        def loss(params):
            prepared = recipe.objective.prepare(batch, train=True)
            return recipe.objective.loss(step.blueprint.bind(params), prepared, jax.random.key(0))

        return jax.vjp(loss, params, has_aux=True)[1]

    params = {k: jax.ShapeDtypeStruct(s.shape, s.dtype) for k, s in step.blueprint.shapes.items()}
    kept = jax.eval_shape(pullback, params, recipe.objective.batch_spec(recipe.model, batch))
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
