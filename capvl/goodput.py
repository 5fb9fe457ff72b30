"""Where a run's time went, over all its restarts, in seconds that add up to the wall time.

At any moment a process is in exactly one bucket. The first host appends its totals to
`goodput.jsonl` at every logging step, so that what a killed process did is known up to there.
"""

import contextlib
import json
import time

import jax
import psutil
from etils import epath

from capvl import storage
from capvl.lines import split

BUCKETS = ("start_up", "compile", "data_wait", "step", "evaluation", "checkpoint")


class Ledger:
    """Totals of this process.

    Attributes:
      seconds: bucket -> seconds until the last change of bucket; `read` brings them up to date.
    """

    def __init__(self, workdir: epath.Path, now=time.time):
        """Begins in `start_up`, at the moment when the process was started."""
        self._now, self._begin = now, psutil.Process().create_time()
        self._lines = storage.Lines(workdir / "goodput.jsonl") if jax.process_index() == 0 else None
        self.seconds = dict.fromkeys(BUCKETS, 0.0)
        self._bucket, self._since = "start_up", self._begin

    def enter(self, bucket: str) -> None:
        """From now on time is spent in this bucket."""
        now = self._now()
        self.seconds[self._bucket] += now - self._since
        self._bucket, self._since = bucket, now

    @contextlib.contextmanager
    def spend(self, bucket: str):
        """Spends the time of a block in a bucket, then goes back to the one before."""
        before = self._bucket
        self.enter(bucket)
        try:
            yield
        finally:
            self.enter(before)

    def read(self) -> dict[str, float]:
        """Totals until now."""
        self.enter(self._bucket)
        return dict(self.seconds)

    def write(self, step: int) -> None:
        """Appends the totals after a step to the run's file."""
        if self._lines is None:
            return
        line = {"begin": self._begin, "time": self._now(), "step": step, "seconds": self.read()}
        self._lines.append(json.dumps(line))

    def flush(self) -> None:
        """Writes what a bucket's file still waits for."""
        if self._lines is not None:
            self._lines.flush()


def summary(workdir: epath.Path) -> dict[str, float]:
    """Seconds in each bucket over all processes of a run, {} where nothing is known.

    Beside BUCKETS: `lost`, steps that a later process did again (taken out of `step`), and
    `down`, from the last thing known of one process to the start of the next. They add up to
    `wall`, from the first start to the last line.
    """
    path = epath.Path(workdir) / "goodput.jsonl"
    sessions = _sessions(path) if path.exists() else []
    if not sessions:
        return {}
    total = dict.fromkeys((*BUCKETS, "lost", "down"), 0.0)
    for i, lines in enumerate(sessions):
        for bucket, seconds in lines[-1]["seconds"].items():
            total[bucket] += seconds
        if i + 1 < len(sessions):
            total["down"] += sessions[i + 1][0]["begin"] - lines[-1]["time"]
            total["lost"] += _spent_after(lines, sessions[i + 1][0]["step"])
    total["step"] -= total["lost"]
    return total | {"wall": sessions[-1][-1]["time"] - sessions[0][0]["begin"]}


def describe(seconds: dict[str, float]) -> str:
    """One line of a summary."""
    wall = seconds["wall"]
    parts = [
        f"{name} {value / wall:.1%}" for name, value in seconds.items() if name != "wall" and value > 0.0005 * wall
    ]
    return f"Goodput {seconds['step'] / wall:.1%} of {wall:,.0f} s: {', '.join(parts)}"


def _sessions(path: epath.Path) -> list[list[dict]]:
    """The lines of each process, in order; an unfinished last line is left out."""
    sessions = []
    for text in split(storage.read_text(path)):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not sessions or sessions[-1][-1]["begin"] != line["begin"]:
            sessions.append([])
        sessions[-1].append(line)
    return sessions


def _spent_after(lines: list[dict], step: int) -> float:
    """Seconds of `step` that one process spent after a step, the lines between two steps interpolated."""
    last = lines[-1]
    before = [line for line in lines if line["step"] <= step]
    if not before or last["step"] <= step:
        return 0.0 if before else last["seconds"]["step"]
    known = before[-1]
    after = next(line for line in lines if line["step"] > step)
    share = (step - known["step"]) / (after["step"] - known["step"])
    at_step = known["seconds"]["step"] + share * (after["seconds"]["step"] - known["seconds"]["step"])
    return last["seconds"]["step"] - at_step
