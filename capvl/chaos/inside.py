"""A training process with a fault inside: python -m capvl.chaos.inside KIND SEED, then arguments of capvl.main."""

import errno
import random
import sys
import time

from capvl import main
from capvl.command import run
from capvl.data.reading import sources

FIRED = "chaos: "
"""What a fault prints when it happens begins with this."""


class Records:
    """A data source whose reads are disturbed."""

    def __init__(self, data, disturb):
        self._data, self._disturb, self._reads = data, disturb, 0

    def __len__(self):
        return len(self._data)

    def __getitem__(self, index):
        self._reads += 1
        self._disturb(self._reads)
        return self._data[index]


def _failing_reads(rng: random.Random) -> None:
    """Twice two reads in a row fail."""
    bad = {n + k for n in rng.sample(range(20, 400, 5), 2) for k in range(2)}

    def disturb(n):
        if n in bad:
            print(f"{FIRED}read {n} fails", flush=True)
            raise OSError(errno.EIO, "Input/output error")

    _disturb_reads(disturb)


def _slow_storage(rng: random.Random) -> None:
    """A read in ten takes 0.1 s, and every save a second longer."""

    def disturb(n):
        if n == 1:
            print(f"{FIRED}storage is slow", flush=True)
        if rng.random() < 0.1:
            time.sleep(0.1)

    _disturb_reads(disturb)
    _before_saves("save", lambda n: time.sleep(1.0))


def _hanging_read(rng: random.Random) -> None:
    """A read never returns."""
    last = rng.randrange(100, 300)

    def disturb(n):
        if n >= last:
            print(f"{FIRED}read {n} hangs", flush=True)
            time.sleep(1e9)

    _disturb_reads(disturb)


def _failing_saves(rng: random.Random) -> None:
    """The second save fails, at its beginning or in the background."""

    def disturb(n):
        if n == 2:
            print(f"{FIRED}save {n} fails", flush=True)
            raise OSError(errno.EIO, "Input/output error")

    _before_saves(rng.choice(["save", "check_for_errors"]), disturb)


def _disturb_reads(disturb) -> None:
    opened = sources._open_split
    sources._open_split = lambda *arguments: Records(opened(*arguments), disturb)


def _before_saves(method: str, disturb) -> None:
    # orbax is slow to import.
    import orbax.checkpoint as ocp

    call, calls = getattr(ocp.CheckpointManager, method), []

    def disturbed(*arguments, **options):
        calls.append(None)
        disturb(len(calls))
        return call(*arguments, **options)

    setattr(ocp.CheckpointManager, method, disturbed)


KINDS = {
    "reads_fail": _failing_reads,
    "saves_fail": _failing_saves,
    "slow_storage": _slow_storage,
    "hang": _hanging_read,
}
"""Faults by name; all but the hang pass, and the process has to go on."""


if __name__ == "__main__":
    kind, seed = sys.argv[1:3]
    KINDS[kind](random.Random(seed))
    run(lambda _: main.main(sys.argv[3:]))
