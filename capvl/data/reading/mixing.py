"""Batches of mixtures that have streams among their parts.

Batch k of size B holds the examples k B … (k + 1) B - 1, sorted by (part, lane, number), and host h makes its part of
them: any number of hosts makes the same batches, and a host mostly reads lanes of its own. What is needed of a block is
known before it is read, and blocks are read ahead of need by threads: a host has at most (window + AHEAD) / hosts
records waiting, and `data.prefetch` batches.
"""

import collections
import concurrent.futures
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from capvl.data.reading.batches import stack
from capvl.data.reading.stream_order import Block, Shares
from capvl.data.reading.streams import Row, Stream

AHEAD = 2048
"""Examples of all hosts that are read ahead of need; a window where that is less, `data.prefetch` batches if more."""
READERS = 16
"""Threads that read."""
PLANNED = 4096
"""Examples whose places are computed at once, at least."""


class Prepared(Protocol):
    """A part that is read at random."""

    def example(self, n: int, number: int, transform) -> dict[str, Any]:
        """Example n of the mixture, which is number so and so of this part."""


@dataclasses.dataclass
class _Planned:
    """A batch's rows on this host: arrays (rows,)."""

    first: int
    part: np.ndarray
    n: np.ndarray
    number: np.ndarray
    places: np.ndarray  # (rows, 4): epoch, lane, block, record.


class MixedBatches:
    """Endless batches of this host; see the module's text."""

    def __init__(
        self, parts: list[Stream | Prepared], weights: list[float], transform, options, *, seed, batch, position, rows
    ):
        """What is mixed.

        Args:
          parts: streams and others.
          weights: one each.
          transform: the objective's, training form.
          options: `config.data`.
          seed: of the augmentation.
          batch: global batch size.
          position: example to begin with.
          rows: of a global batch that this host makes.
        """
        self._parts, self._shares = parts, Shares(weights)
        self._transform, self._options, self._seed = transform, options, seed
        self._batch, self._rows, self._next = batch, rows, position
        self._planned: collections.deque[_Planned] = collections.deque()
        self._requested = 0  # Of those, from the left.
        self._needs: list[dict[Block, list[tuple[np.ndarray, np.ndarray]]]] = [{} for _ in parts]
        self._seen = [-1] * len(parts)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        threads, prefetch = self._options.threads, self._options.prefetch
        ahead = max(min(AHEAD, self._options.window), prefetch * self._batch)
        pool = concurrent.futures.ThreadPoolExecutor(threads, "capvl-make")
        readers = concurrent.futures.ThreadPoolExecutor(READERS, "capvl-read")
        coming: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            while True:
                while len(coming) < max(prefetch, threads):
                    self._request(ahead, readers)
                    self._requested -= 1
                    coming.append(pool.submit(self._make, self._planned.popleft()))
                yield coming.popleft().result()
        finally:
            if not sys.is_finalizing():  # Then nothing is left to shut them down with.
                pool.shutdown(wait=False, cancel_futures=True)
                readers.shutdown(wait=False)

    def _make(self, batch: _Planned) -> dict[str, np.ndarray]:
        of_batch = getattr(self._transform, "for_batch", None)
        transform = of_batch(batch.first // self._batch) if of_batch else self._transform
        rows = []
        for part, n, number, place in zip(batch.part, batch.n, batch.number, batch.places.tolist(), strict=True):
            source = self._parts[part]
            if isinstance(source, Stream):
                rows.append(source.example(Row(int(n), *place), transform, self._seed))
            else:
                rows.append(source.example(int(n), int(number), transform))
        return stack(rows)

    def _plan(self) -> None:
        """Computes the places of some more batches, and what this host needs of each block."""
        count = -(-min(PLANNED, self._options.window) // self._batch)
        begin, n = self._next, self._next + np.arange(count * self._batch)
        self._next += len(n)
        part, number = self._shares(n) if len(self._parts) > 1 else (np.zeros_like(n), n)
        places = np.zeros((len(n), 4), np.int64)
        for i, source in enumerate(self._parts):
            own = np.flatnonzero(part == i)
            if isinstance(source, Stream) and len(own):
                places[own] = np.stack(source.order(number[own]), axis=1)
                self._seen[i] = int(number[own[-1]])
        order = np.lexsort((n, places[:, 1], part, (n - begin) // self._batch))
        order = order.reshape(count, self._batch)[:, self._rows.start : self._rows.stop]
        for k, rows in enumerate(order):
            self._planned.append(_Planned(begin + k * self._batch, part[rows], n[rows], number[rows], places[rows]))
        for i, source in enumerate(self._parts):
            if isinstance(source, Stream):
                own = order.ravel()[part[order.ravel()] == i]
                for key, rows in _by_block(places[own]):
                    self._needs[i].setdefault(key, []).append((n[own[rows]], places[own[rows], 3]))

    def _request(self, ahead: int, readers: concurrent.futures.Executor) -> None:
        """Has everything read that the next batch needs, and those that begin less than so many examples behind it."""
        jobs = []
        while self._requested == 0 or self._planned[self._requested - 1].first - self._planned[0].first < ahead:
            if self._requested == len(self._planned):
                self._plan()
            jobs += self._jobs(self._planned[self._requested])
            self._requested += 1
        for job in sorted(jobs, key=lambda job: job.n):
            readers.submit(job.call, readers)

    def _jobs(self, batch: _Planned) -> list:
        """What is to be read of the blocks that a batch is the first to need."""
        jobs = []
        for i, source in enumerate(self._parts):
            if not isinstance(source, Stream):
                continue
            for key, _ in _by_block(batch.places[batch.part == i]):
                if key not in self._needs[i]:
                    continue
                while self._seen[i] < source.order.last(key):
                    self._plan()
                needed = self._needs[i].pop(key)
                jobs += source.fetch(key, *(np.concatenate(arrays) for arrays in zip(*needed, strict=True)))
        return jobs


def _by_block(places: np.ndarray) -> list[tuple[Block, np.ndarray]]:
    """(block, which rows (n,)) of each block among some places (rows, 4)."""
    order = np.lexsort((places[:, 2], places[:, 1], places[:, 0]))
    keys = places[order, :3]
    edges = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    return [(tuple(places[rows[0], :3].tolist()), rows) for rows in np.split(order, edges) if len(rows)]
