"""Start-up of a run on several processes, how they agree, and what happens when one is lost."""

import contextlib
import glob
import hashlib
import importlib.util
import os
import pathlib
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from capvl import command
from capvl.errors import UserError
from capvl.parallel import rendezvous

CONNECT_SECONDS = 120
# A process that is silent for so long is taken for dead, and ends the others.
HEARTBEAT_SECONDS = 40
GOODBYE_SECONDS = 10
T = TypeVar("T")


def start() -> None:
    """Joins the other processes where the environment names them; does nothing for one process.

    By hand, $JAX_COORDINATOR_ADDRESS (host:port), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID name
    them; the index may also be Kubernetes' $JOB_COMPLETION_INDEX. On TPU slices and under SLURM
    JAX finds the others itself.

    Raises:
      UserError: the variables contradict each other, or the coordinator can't be reached.
    """
    command.leave_by(leave)
    if (_by_hand() or _managed()) and os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if _by_hand():
        address, count, index = _named_by_hand()
        rendezvous.meet(address, count, index, CONNECT_SECONDS)
        _initialize(f"Process {index} could not join the {count} processes at {address}", address, count, index)
    elif _managed():
        _initialize("This process could not join the others that its cluster names", None, None, None)


def _by_hand() -> bool:
    return bool(os.environ.get("JAX_COORDINATOR_ADDRESS"))


def _managed() -> bool:
    """Whether this is one of several processes of a TPU slice, of several slices, or of a SLURM step."""
    several_hosts = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    several_slices = int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    several_tasks = int(os.environ.get("SLURM_NTASKS") or 1) > 1
    return several_hosts or several_slices or several_tasks or (_has_tpus() and _tpu_vm_hosts() > 1)


def _has_tpus() -> bool:
    chips = [*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/[0-9]*")]
    return bool(chips) and bool(importlib.util.find_spec("libtpu")) and os.environ.get("JAX_PLATFORMS") != "cpu"


def _tpu_vm_hosts() -> int:
    """Hosts of all slices that this TPU VM belongs to, as Google's metadata server knows them; 1 elsewhere.

    Nothing in the environment of a TPU VM says so.
    """
    workers, variables = _metadata("worker-network-endpoints"), _metadata("tpu-env")
    slices = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", variables)
    return len(workers.split(",")) * (int(slices[1]) if slices else 1)


def _metadata(key: str) -> str:
    """An attribute of this virtual machine; "" where there is none, or no metadata server."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    for _ in range(3):
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return response.read().decode()
        except urllib.error.HTTPError as e:
            if e.code == 404:
                return ""
        except OSError:
            continue
    return ""


def _named_by_hand() -> tuple[str, int, int]:
    address = os.environ["JAX_COORDINATOR_ADDRESS"]
    index = os.environ.get("JAX_PROCESS_ID") or os.environ.get("JOB_COMPLETION_INDEX") or ""
    try:
        count, index = int(os.environ.get("JAX_NUM_PROCESSES", "")), int(index)
    except ValueError as e:
        raise UserError("JAX_COORDINATOR_ADDRESS needs JAX_NUM_PROCESSES and JAX_PROCESS_ID, whole numbers.") from e
    if not 0 <= index < count:
        raise UserError(f"JAX_PROCESS_ID={index} should be between 0 and {count - 1}.")
    return address, count, index


def _initialize(sentence: str, address, count, index) -> None:
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as e:
        raise UserError(f"{sentence}: {str(e).splitlines()[0]}") from e


def leave(code: int) -> None:
    """Ends this process with an exit code; says good-bye to the others where they are still there."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(GOODBYE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def largest(value: int) -> int:
    """The largest of all processes' values, on all of them."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def first(call: Callable[[], T]) -> T | None:
    """What a call gives on the first process, and None on the others; its UserError ends all."""
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = call()
        except UserError as e:
            error = e
    if largest(int(error is not None)):
        raise error or UserError("The first process can't go on; it says why.")
    return result


def first_number(call: Callable[[], float]) -> np.float32:
    """The number that a call gives on the first process, on all of them; its UserError ends all."""
    value = np.float32(first(call) or 0.0)
    return value if jax.process_count() == 1 else np.float32(multihost_utils.broadcast_one_to_all(value))


def code_version() -> str:
    """A digest of the package's source files."""
    digest, package = hashlib.sha256(), pathlib.Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def check_same(**facts: str) -> None:
    """Compares facts, such as the recipe, between all processes.

    Raises:
      UserError: some process has another fact than most; the same sentence on all of them.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(fact.encode()).digest()[:8] for fact in facts.values()]
    mine = np.frombuffer(b"".join(digests), np.uint32).reshape(len(facts), 2)
    gathered = np.asarray(multihost_utils.process_allgather(mine))
    for name, column in zip(facts, np.swapaxes(gathered, 0, 1), strict=True):
        rows, which = np.unique(column, axis=0, return_inverse=True)
        if len(rows) > 1:
            # With equal numbers on both sides, process 0 is right.
            counts = np.bincount(which.ravel()) + (np.arange(len(rows)) == which.ravel()[0]) * 0.5
            odd = np.flatnonzero(which.ravel() != counts.argmax())
            raise UserError(
                f"Process {', '.join(map(str, odd))} of {len(column)} has another {name.replace('_', ' ')} than the "
                f"others; start all with the same command, configuration and code."
            )


@contextlib.contextmanager
def ends_when_others_are_lost():
    """Ends this process at once where a collective fails, without waiting for processes that are gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if jax.process_count() == 1:
            raise
        reason = " ".join(str(e).split())[:200]
        print(
            f"error: Process {jax.process_index()} failed or lost another one ({reason}); start all again with the "
            f"same workdir to resume.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
