"""Evaluation batches: every example of a source once, in order, made ahead.

Rows are made a few at a time, in threads or in worker processes, so that a small set with large batches occupies all of
them too. What comes out is the same whatever makes it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import cloudpickle
import grain
import numpy as np

from capvl import storage
from capvl.data.images.decode import BadImageError
from capvl.data.randomness import Uniforms
from capvl.data.reading import loader
from capvl.data.reading.batches import stack
from capvl.errors import UserError
from capvl.terminal import say

ROWS = 16
"""Rows of an evaluation batch that are made at a time."""
WORKERS_FROM = 4096
"""Worker processes begin slowly: fewer examples of a host are read in threads, whatever `workers` says."""


class NoImageError(UserError):
    """None of the images of a source can be decoded."""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A source of the numbers of rows, for a transform that makes rows of these.

    Attributes:
      name: of the rows, for messages.
      count: how many there are.
    """

    name: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


@dataclasses.dataclass
class EvalRows:
    """Makes part k of evaluation batches: at most ROWS consecutive rows of this host. Picklable, as `TrainBatch` is."""

    source: Any
    transform: Any
    batch: int
    rows: range
    size: int

    @property
    def parts(self) -> int:
        """Of a batch."""
        return -(-len(self.rows) // ROWS)

    def __call__(self, k: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Which of the rows are examples (bool), and these stacked; {} where none is."""
        number, part = divmod(int(k), self.parts)
        rows = self.rows[part * ROWS : (part + 1) * ROWS]
        numbers = [number * self.batch + row for row in rows]
        examples = [self.example(n) if n < self.size else None for n in numbers]
        there = np.array([example is not None for example in examples])
        return there, _stacked([e for e in examples if e], np.array(numbers)[there]) if there.any() else {}

    def example(self, n: int) -> dict[str, Any] | None:
        """Example n; None where its image is bad."""
        with contextlib.suppress(BadImageError):
            return self.transform(self.source[n], Uniforms(0, n))
        return None

    def blank(self) -> dict[str, np.ndarray]:
        """One example, stacked, for what a row of padding looks like."""
        for n in range(len(self.source)):
            if example := self.example(n):
                return _stacked([example], np.array([n]))
        raise NoImageError(f"Data set {self.source.name!r} has no image that can be decoded.")


def _stacked(examples: list[dict[str, Any]], numbers: np.ndarray) -> dict[str, np.ndarray]:
    return stack(examples) | {"mask": np.ones(len(examples), bool), "index": numbers.astype(np.int32)}


def eval_batches(
    source,
    transform,
    batch: int,
    host: loader.Host | None = None,
    limit: int = 0,
    *,
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 4,
) -> Iterator[dict]:
    """Every example once, in order, padded with `mask` False; every host has as many batches.

    A bad image becomes a padded row (mask False), so it counts nowhere. Batches are the same whatever makes them.
    Closing the iterator ends what makes them; `contextlib.closing` does so whatever happens.

    Args:
      source: what `open_source` returned, or anything else of examples with a length and a name.
      transform: the evaluation form of a transform.
      batch: global batch size.
      host: this host, by default.
      limit: only so many examples; 0 for all.
      threads: parts of batches that are made at once.
      workers: processes that make them, for WORKERS_FROM examples of a host and more; 0 for threads of this one.
      prefetch: batches that are made ahead at most (of so small ones that these don't occupy all threads or workers,
        as many as do).
    """
    host = host or loader.Host.this()
    size, rows = min(len(source), limit or len(source)), host.rows(batch)
    make, count = EvalRows(source, transform, batch, rows, size), -(-size // batch)
    parts = _parts(make, count, threads, workers, prefetch)
    blank = None
    try:
        for _ in range(count):
            made = [next(parts) for _ in range(make.parts)]
            blank = blank or next((own for _, own in made if own), None) or make.blank()
            yield _joined(made, blank)
    finally:
        parts.close()


def _parts(make: EvalRows, batches: int, threads: int, workers: int, prefetch: int):
    """All parts in order, made ahead."""
    dataset = grain.MapDataset.range(batches * make.parts).map(make)
    ahead = prefetch * make.parts
    if workers and len(make.rows) * batches >= WORKERS_FROM and _goes_to_workers(make):
        each = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        loader.parse_flags()
        of_worker = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-ahead // workers))
        return iter(dataset.to_iter_dataset(each).mp_prefetch(of_worker))
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    return iter(dataset.to_iter_dataset(read))


def _goes_to_workers(make: EvalRows) -> bool:
    """Whether other processes can have it; where they can't, that is said."""
    try:
        cloudpickle.dumps(make)
    except Exception as e:  # Whatever a class of the user's own raises.
        say(f"{make.source.name} can't be sent to worker processes ({storage.reason(e)}): it is read in threads.")
        return False
    return True


def _joined(parts: list[tuple[np.ndarray, dict]], blank: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch of its parts; rows that are no examples are zeros, with index -1."""
    rows = sum(len(there) for there, _ in parts)
    out = {key: np.zeros((rows, *value.shape[1:]), value.dtype) for key, value in blank.items()}
    out["index"] -= 1
    first = 0
    for there, own in parts:
        chosen = slice(first, first + len(there)) if there.all() else first + np.flatnonzero(there)
        for key, value in own.items():
            out[key][chosen] = value
        first += len(there)
    return out
