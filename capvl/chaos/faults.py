"""What is done to a run from outside; each fault ends its processes, and the next start has to go on."""

import contextlib
import pathlib
import random
import signal
import time

from capvl.chaos.fleet import Fleet


def kill(fleet: Fleet, rng: random.Random) -> None:
    """SIGKILL between two steps, to one process; the others have to end by themselves."""
    fleet.signal(signal.SIGKILL, rng.randrange(fleet.size))
    fleet.wait()


def kill_in_save(fleet: Fleet, rng: random.Random) -> None:
    """SIGKILL while a checkpoint is written."""
    fleet.until(fleet.saving)
    kill(fleet, rng)


def kill_at_start(fleet: Fleet, rng: random.Random) -> None:
    """SIGKILL before the first step."""
    time.sleep(rng.uniform(0.1, 6.0))
    kill(fleet, rng)


def terminate(fleet: Fleet, rng: random.Random) -> None:
    """SIGTERM: all have to save and leave with 0."""
    fleet.signal(signal.SIGTERM, rng.randrange(fleet.size))
    codes = fleet.wait()
    if any(codes):
        raise AssertionError(f"after SIGTERM the exit codes were {codes}:\n{fleet.printed()}")


def flip_bit(fleet: Fleet, rng: random.Random) -> None:
    """One bit of the newest checkpoint is wrong."""
    file = _newest_checkpoint_file(fleet, rng)
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut_file(fleet: Fleet, rng: random.Random) -> None:
    """A file of the newest checkpoint is cut short."""
    _cut(_newest_checkpoint_file(fleet, rng), rng)


def lose_file(fleet: Fleet, rng: random.Random) -> None:
    """A file of the newest checkpoint is gone."""
    _newest_checkpoint_file(fleet, rng).unlink()


def tear_logs(fleet: Fleet, rng: random.Random) -> None:
    """The last lines of the logs are half written."""
    kill(fleet, rng)
    for name in ("metrics.jsonl", "goodput.jsonl"):
        file = fleet.workdir / name
        if file.exists() and len(data := file.read_bytes()) > 2:
            last = data.rstrip(b"\n").rpartition(b"\n")[2]
            file.write_bytes(data[: -rng.randrange(1, len(last) + 1)])


def cut_cache(fleet: Fleet, rng: random.Random) -> None:
    """A compiled program in the cache is cut short."""
    kill(fleet, rng)
    files = [f for f in (fleet.workdir / "compiled").glob("*-cache") if f.stat().st_size]
    if files:
        _cut(rng.choice(sorted(files)), rng)


def fill_disk(fleet: Fleet, rng: random.Random) -> None:
    """The disk is full: the run has to end with code 2 and one sentence."""
    ballast = fleet.workdir / "ballast"
    try:
        # It stands still meanwhile: a short run would be over before the disk is full.
        for process in range(fleet.size):
            fleet.signal(signal.SIGSTOP, process)
        with ballast.open("wb", buffering=0) as file:
            for size in (2**20, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"\0" * size)
        for process in range(fleet.size):
            fleet.signal(signal.SIGCONT, process)
        codes = fleet.wait()
    finally:
        ballast.unlink(missing_ok=True)
    if 2 not in codes or "disk is full" not in fleet.printed():
        raise AssertionError(f"on a full disk the exit codes were {codes}:\n{fleet.printed()}")


def _newest_checkpoint_file(fleet: Fleet, rng: random.Random) -> pathlib.Path:
    """Kills the run once it has two whole checkpoints; a file of the newer one, likelier the larger it is."""
    fleet.until(lambda: len(fleet.committed()) > 1)
    kill(fleet, rng)
    newest = fleet.committed()[-1]
    files = sorted(f for f in newest.rglob("*") if f.is_file() and f.stat().st_size)
    return rng.choices(files, [f.stat().st_size for f in files])[0]


def _cut(file: pathlib.Path, rng: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


KINDS = {
    f.__name__: f
    for f in (
        kill,
        kill_in_save,
        kill_at_start,
        terminate,
        flip_bit,
        cut_file,
        lose_file,
        tear_logs,
        cut_cache,
        fill_disk,
    )
}
"""Faults by name."""
