"""What libtpu, the compiler for TPUs, wants of a process: variables before JAX starts, and a lock of the machine's."""

import contextlib
import os
import pathlib
import re
import tempfile
import time

from capvl.errors import UserError

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


def wait_for_lock(limit: float, say=print) -> None:
    """Returns when libtpu's lock is free, or at once where $ALLOW_MULTIPLE_LIBTPU_LOAD is set.

    Raises:
      UserError: it is still held after `limit` seconds.
    """
    if os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD"):
        return
    begin, announced = time.monotonic(), False
    while holder := lock_holder():
        if time.monotonic() - begin > limit:
            raise UserError(
                f"libtpu is locked by {holder} and was not released within {limit:.0f} s; wait for it, stop it, or set "
                f"ALLOW_MULTIPLE_LIBTPU_LOAD=1 if it doesn't use a TPU either."
            )
        if not announced:
            say(f"Waiting up to {limit:.0f} s for libtpu, which {holder} holds …")
            announced = True
        time.sleep(1.0)
