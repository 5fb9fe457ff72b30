"""Where numbers go: JSON lines, trackers, and what a terminal line says of speed."""

import json
import math
import tempfile

import jax
from etils import epath

from capvl import chips, storage, trackers
from capvl.errors import UserError
from capvl.goodput import Ledger
from capvl.lines import split


def open_workdir(workdir: str) -> epath.Path:
    """Makes a workdir.

    Raises:
      UserError: it can't be written.
    """
    path = storage.folder(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not storage.in_bucket(path):
            with tempfile.TemporaryFile(dir=path):  # A name of its own: all hosts of a run come here at once.
                pass
    except Exception as e:
        if isinstance(e, OSError) or storage.in_bucket(path):
            raise UserError(f"Workdir {workdir!r} can't be written: {storage.reason(e)}.") from e
        raise
    return path


class MetricWriter:
    """Appends to `metrics.jsonl` and passes on to trackers, on the first host only."""

    def __init__(self, workdir: epath.Path, first_step: int = 0, wandb: str = "", recipe: dict | None = None):
        """Opens them.

        Args:
          workdir: of the run.
          first_step: lines of later steps, left by a killed run, are dropped.
          wandb: a project there; "" for none.
          recipe: plain values, to be shown by trackers.
        """
        self._lines, self._trackers = None, []
        if jax.process_index():
            return
        self._lines = storage.Lines(workdir / "metrics.jsonl", lambda line: _step_of(line) <= first_step)
        self._trackers = trackers.start(workdir, first_step, wandb, recipe or {})

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, and one point for each value.

        Raises:
          UserError: the line can't be written.
        """
        if self._lines is None:
            return
        clean = {k: (v if math.isfinite(v) else str(v)) for k, v in values.items()}
        self._lines.append(json.dumps({"step": step} | clean))
        for tracker in self._trackers:
            tracker.write(step, values)

    def flush(self) -> None:
        """Writes what a bucket's file still waits for."""
        if self._lines is not None:
            self._lines.flush()

    def close(self) -> None:
        """Writes what waits and ends the trackers."""
        self.flush()
        for tracker in self._trackers:
            tracker.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read(workdir: epath.Path) -> list[dict]:
    """The lines of metrics.jsonl; an unfinished last line is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"Workdir {str(workdir)!r} has no metrics.jsonl; train there first.")
    return _read(path)


def read_evaluations(workdir: epath.Path) -> list[dict]:
    """The lines of evaluations.jsonl, each of which `capvl.evaluation` appended; [] where nothing was evaluated."""
    path = epath.Path(workdir) / "evaluations.jsonl"
    return _read(path) if path.exists() else []


def _read(path: epath.Path) -> list[dict]:
    return [json.loads(line) for line in split(storage.read_text(path)) if _step_of(line) < math.inf]


class Clock:
    """Throughput between two logging steps: what share of the time was waiting for data."""

    def __init__(self, ledger: Ledger, batch: int, flops_per_example: float):
        self._ledger, self._batch, self._flops = ledger, batch, flops_per_example
        self._devices = jax.device_count()
        self._peak = chips.peak_flops(jax.devices()[0].device_kind)
        self._begin: tuple[dict[str, float], int] | None = None

    @property
    def started(self) -> bool:
        """Whether the first step, with its compilation, is over."""
        return self._begin is not None

    def compiled(self, step: int) -> float:
        """Ends the first step: seconds that it took. Intervals begin here."""
        self.start(step)
        return self._begin[0]["compile"]

    def start(self, step: int) -> None:
        """Begins an interval after `step`."""
        self._begin = self._ledger.read(), step

    def read(self, step: int) -> dict[str, float]:
        """Speeds since `start`, which is called anew; evaluation and checkpoints don't count."""
        (before, first), now = self._begin, self._ledger.read()
        waited = now["data_wait"] - before["data_wait"]
        seconds = max(now["step"] - before["step"] + waited, 1e-9)
        steps = max(step - first, 1)
        rate = steps * self._batch / seconds
        out = {
            "images_per_second": rate,
            "images_per_second_per_chip": rate / self._devices,
            "data_wait": waited / seconds,
            "seconds_per_step": seconds / steps,
        }
        if self._peak:
            out["mfu"] = rate * self._flops / (self._devices * self._peak)
        self.start(step)
        return out
