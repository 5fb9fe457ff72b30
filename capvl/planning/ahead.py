"""Compiles a recipe's train step for TPUs that aren't here (JAX's ahead-of-time compilation through libtpu)."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import tempfile
import time

from capvl.errors import UserError
from capvl.planning.topology import Topology

QUIET = {
    "JAX_PLATFORMS": "cpu",  # The step is compiled for chips, but nothing runs on any.
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # A program for chips that aren't here can't be read back.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def prepare_environment() -> None:
    """Variables that libtpu and JAX read when they start; call it before either does."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


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


def lock_holder() -> str | None:
    """Which process holds libtpu's machine-wide lock, as "pid (command)"; None where nobody does."""
    path = pathlib.Path(tempfile.gettempdir(), "libtpu_lockfile")
    if not path.exists():
        return None
    for lock in pathlib.Path("/proc/locks").read_text().splitlines():
        found = re.search(r" (\d+) \w+:\w+:(\d+) ", lock)
        if found and int(found[2]) == path.stat().st_ino and int(found[1]) != os.getpid():
            with contextlib.suppress(OSError):
                words = pathlib.Path("/proc", found[1], "cmdline").read_bytes().split(b"\0")
                return f"process {found[1]} ({b' '.join(words).decode(errors='replace').strip()[:80]})"
            return f"process {found[1]}"
    return None


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


def wait_for_lock(limit: float, say=print) -> None:
    """Returns when libtpu's lock is free, or at once where $ALLOW_MULTIPLE_LIBTPU_LOAD is set.

    Raises:
      UserError: it is still held after `limit` seconds.
    """
    if os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD"):
        return
    begin, said = time.monotonic(), False
    while holder := lock_holder():
        if time.monotonic() - begin > limit:
            raise UserError(
                f"libtpu is locked by {holder} and was not released within {limit:.0f} s; wait for it, stop it, or set "
                f"ALLOW_MULTIPLE_LIBTPU_LOAD=1 if it doesn't use a TPU either."
            )
        if not said:
            say(f"Waiting up to {limit:.0f} s for libtpu, which {holder} holds …")
            said = True
        time.sleep(1.0)


@functools.lru_cache
def devices(topology: Topology) -> tuple:
    """The topology's chips, for compilation only.

    Raises:
      UserError: libtpu is missing, locked, or doesn't know the topology.
    """
    import importlib.util

    if not importlib.util.find_spec("libtpu"):
        raise UserError(
            "Compiling for TPUs needs libtpu: pip install -e '.[tpu]', or --analytic for a plan on paper alone."
        )
    from jax.experimental import topologies

    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        with _silenced():
            described = topologies.get_topology_desc(name, "tpu", num_slices=topology.slices)
    except Exception as e:  # jaxlib raises several types; any of them means that libtpu refused.
        if "lockfile" in str(e):
            raise UserError(f"libtpu was locked by {lock_holder() or 'another process'} just now; try again.") from e
        raise UserError(f"libtpu can't describe {topology.name}: {str(e).splitlines()[0]}") from e
    return tuple(described.devices)


def compile_step(recipe, topology: Topology) -> Compiled:
    """Compiles the recipe's train step, the very one that `capvl.train` runs.

    Raises:
      DoesNotFitError: the program needs more HBM than a chip has.
      UserError: mesh or batch don't fit the topology.
    """
    import jax

    from capvl.parallel.mesh import make_mesh
    from capvl.parallel.rules import batch_sharding

    mesh = make_mesh(recipe.mesh, list(devices(topology)))
    recipe.check(mesh)
    step = recipe.train_step()
    sharding = batch_sharding(mesh)
    batch = recipe.batch_spec(sharding)
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
