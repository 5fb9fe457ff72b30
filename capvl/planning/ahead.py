"""Compiles a recipe's train step for TPUs that aren't here (JAX's ahead-of-time compilation through libtpu)."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import time

import jax
from jax.experimental import topologies

from capvl.data.images.buckets import Bucket
from capvl.errors import UserError
from capvl.parallel.mesh import make_mesh
from capvl.parallel.rules import batch_sharding
from capvl.planning.libtpu import lock_holder
from capvl.planning.topology import Topology


class DoesNotFitError(Exception):
    """The program needs more HBM than a chip has.

    Attributes:
      needed, available: bytes.
    """

    def __init__(self, needed: float, available: float):
        super().__init__(f"{needed} of {available} bytes")
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step, for one chip.

    Attributes:
      text: the optimised HLO.
      arguments, temporaries, total: bytes of HBM.
      xla_flops, xla_bytes: XLA's own counts, loop bodies counted once.
      seconds: of the compilation.
    """

    text: str
    arguments: int
    temporaries: int
    total: int
    xla_flops: float
    xla_bytes: float
    seconds: float


@contextlib.contextmanager
def _silenced():
    """libtpu warns on stderr that this machine is no TPU host; that goes nowhere."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


@functools.lru_cache
def devices(topology: Topology) -> tuple:
    """The topology's chips, for compilation only.

    Raises:
      UserError: libtpu is missing, locked, or doesn't know the topology.
    """
    if not importlib.util.find_spec("libtpu"):
        raise UserError(
            "Compiling for TPUs needs libtpu: pip install -e '.[tpu]', or --analytic for a plan on paper alone."
        )
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        with _silenced():
            described = topologies.get_topology_desc(name, "tpu", num_slices=topology.slices)
    except Exception as e:  # jaxlib raises several types; any of them means that libtpu refused.
        if "lockfile" in str(e):
            raise UserError(f"libtpu was locked by {lock_holder() or 'another process'} just now; try again.") from e
        raise UserError(f"libtpu can't describe {topology.name}: {str(e).splitlines()[0]}") from e
    return tuple(described.devices)


def compile_step(recipe, topology: Topology, bucket: Bucket | None = None) -> Compiled:
    """Compiles the recipe's train step, the very one that `capvl.train` runs, for batches in one of its buckets.

    Raises:
      DoesNotFitError: the program needs more HBM than a chip has.
      UserError: mesh or batch don't fit the topology.
    """
    mesh = make_mesh(recipe.mesh, list(devices(topology)))
    recipe.check(mesh)
    step = recipe.train_step()
    sharding = batch_sharding(mesh)
    batch = recipe.batch_spec(sharding, bucket)
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = step.jit(mesh).lower(step.abstract_state(mesh), batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            raise _does_not_fit(str(e), topology) or e from e
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Compiled(
        compiled.as_text(),
        arguments,
        temporaries,
        arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        time.perf_counter() - begin,
    )


def _does_not_fit(message: str, topology: Topology) -> DoesNotFitError | None:
    """The compiler's out-of-memory message as numbers; None for any other message."""
    size = r"([\d.]+)([KMGT])"
    found = re.search(rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM \({size}\)", message)
    if not found:
        return None
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    numbers = [part for part in found.groups() if part]
    needed, available = (float(numbers[i]) * unit[numbers[i + 1]] for i in (0, 2))
    return DoesNotFitError(needed, available)
