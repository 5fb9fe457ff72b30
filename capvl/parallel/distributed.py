"""Start-up of a run on several processes, and how they agree."""

import os

import jax

from capvl.errors import UserError


def start() -> None:
    """Joins the other processes where the environment names them; does nothing for one process.

    $JAX_COORDINATOR_ADDRESS (host:port), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID name them by
    hand; on a TPU pod slice (several $TPU_WORKER_HOSTNAMES) JAX finds them itself.

    Raises:
      UserError: the variables contradict each other, or the coordinator can't be reached.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    on_pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if not address and not on_pod:
        return
    if not address:
        jax.distributed.initialize()
        return
    try:
        count, index = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
    except (KeyError, ValueError) as e:
        raise UserError("JAX_COORDINATOR_ADDRESS needs JAX_NUM_PROCESSES and JAX_PROCESS_ID, whole numbers.") from e
    if not 0 <= index < count:
        raise UserError(f"JAX_PROCESS_ID={index} should be between 0 and {count - 1}.")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=120)
    except RuntimeError as e:
        raise UserError(f"Process {index} could not join the {count} processes at {address}: {e}") from e
