"""The order of a stream: example n -> (epoch, lane, block, record), computed from numbers of records alone.

The N records of a stream are numbered file after file and cut into pieces. In each epoch the pieces are permuted, and
the row of records that this gives is cut into L contiguous stretches, one for each lane. Position p of the epoch
belongs to lane p mod L and is number p div L of it. A lane's stretch is cut into blocks of window / L records, and the
records of a block are permuted. Lanes don't end their blocks at the same time: the first block of lane l is cut to
about (l + 1) / L of the others' size. Everything is a function of (seed, position); to go on anywhere, one block of
each lane is needed.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capvl.data.randomness import permutation

PIECE = 500
"""Records of a piece, at most, where the file's format doesn't say otherwise."""
_HELD = 256
"""Blocks whose permutation is remembered, at least."""


class Places(NamedTuple):
    """Where examples come from, an array (n,) int64 each; `record` counts over all files."""

    epoch: np.ndarray
    lane: np.ndarray
    block: np.ndarray
    record: np.ndarray


Block = tuple[int, int, int]
"""Epoch, lane, number."""


def pieces(records: int, largest: int = PIECE) -> list[int]:
    """Sizes of the pieces of a file, as equal as can be."""
    count = -(-records // largest)
    edges = [i * records // count for i in range(count + 1)] if count else [0]
    return [end - begin for begin, end in zip(edges, edges[1:], strict=False)]


class StreamOrder:
    """See the module's text."""

    def __init__(self, sizes: Sequence[int], seed: int, *, lanes: int, window: int):
        """Counts.

        Args:
          sizes: records of each piece, in the order in which records are numbered; there must be some.
          seed: of the order.
          lanes: so many, or one for each piece where these are fewer.
          window: records that are shuffled among one another, over all lanes.
        """
        sizes = np.array(sizes, np.int64)
        sizes = sizes[sizes > 0]
        self._sizes, self._starts = sizes, np.cumsum(sizes) - sizes
        self.size, self.seed = int(sizes.sum()), seed
        self.lanes = min(lanes, len(sizes))
        # As large as an epoch, and the epoch is one block a lane.
        self._width = -(-window // self.lanes) if window < self.size else self.size
        numbers = np.arange(self.lanes)
        staggered = self._width * (numbers + 1) // self.lanes
        self._first = np.maximum(1, staggered if window < self.size else self._width + 0 * numbers)
        self._lengths = (self.size - numbers + self.lanes - 1) // self.lanes
        self._begins = np.cumsum(self._lengths) - self._lengths
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._blocks: dict[Block, np.ndarray] = {}
        self._lock = threading.Lock()

    def __call__(self, numbers: np.ndarray) -> Places:
        """Places of some examples.

        Args:
          numbers: (n,) of the examples, counted over all epochs.
        """
        epoch, position = np.divmod(np.asarray(numbers, np.int64), self.size)
        lane, at = position % self.lanes, position // self.lanes
        block = self._block(lane, at)
        record = np.empty_like(at)
        keys = np.stack([epoch, lane, block], axis=1)
        order = np.lexsort((block, lane, epoch))
        edges = np.flatnonzero((keys[order][1:] != keys[order][:-1]).any(axis=1)) + 1
        for own in np.split(order, edges) if len(order) else ():
            key = tuple(int(k) for k in keys[own[0]])
            record[own] = self.records(key)[at[own] - self._span(key)[0]]
        return Places(epoch, lane, block, record)

    def records(self, block: Block) -> np.ndarray:
        """Records (n,) of a block in their order."""
        with self._lock:
            if block not in self._blocks:
                while len(self._blocks) >= max(_HELD, 4 * self.lanes):
                    self._blocks.pop(next(iter(self._blocks)))
                self._blocks[block] = self._records(block)
            return self._blocks[block]

    def last(self, block: Block) -> int:
        """The number of a block's last example."""
        return block[0] * self.size + (self._span(block)[1] - 1) * self.lanes + block[1]

    def block_of(self, epoch: int, position: int) -> Block:
        """The block of a position of an epoch."""
        lane, at = position % self.lanes, position // self.lanes
        return epoch, lane, int(self._block(lane, at))

    def _block(self, lane, at):
        first = self._first[lane]
        return np.where(at < first, 0, 1 + (at - first) // self._width)

    def _span(self, block: Block) -> tuple[int, int]:
        """Of which number to which one of its lane."""
        _, lane, number = block
        first, length = int(self._first[lane]), int(self._lengths[lane])
        begin = first + (number - 1) * self._width if number else 0
        return begin, min(first + number * self._width, length)

    def _records(self, block: Block) -> np.ndarray:
        epoch, lane, number = block
        begin, end = (int(self._begins[lane]) + at for at in self._span(block))
        order, ends = self._pieces(epoch)
        found, i = [], int(np.searchsorted(ends, begin, side="right"))
        while begin < end:
            until = min(end, int(ends[i]))
            past = self._starts[order[i]] + self._sizes[order[i]] - int(ends[i])
            found.append(np.arange(begin + past, until + past))
            begin, i = until, i + 1
        records = np.concatenate(found)
        return records[permutation(len(records), self.seed, epoch, lane, number)]

    def _pieces(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the pieces of an epoch in their order, where each ends)."""
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            order = permutation(len(self._sizes), self.seed, epoch)
            self._epochs[epoch] = order, np.cumsum(self._sizes[order])
        return self._epochs[epoch]


_WHOLE = 1_000_000


class Shares:
    """Example number -> (part of a mixture, number within it): after n examples each part has had its share of n, up to
    rounding."""

    def __init__(self, weights: Sequence[float]):
        """weights: positive, of any sum."""
        self._parts = [max(1, round(_WHOLE * weight / sum(weights))) for weight in weights]

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(part (n,), number within it (n,)) of examples (n,)."""
        now = np.asarray(numbers, np.int64)
        then, rest = now + 1, sum(self._parts)
        part, number = np.full(now.shape, -1), np.zeros_like(now)
        for i, own in enumerate(self._parts):
            now_rest, then_rest = now * (rest - own) // rest, then * (rest - own) // rest
            taken = (part < 0) & (now - now_rest < then - then_rest)
            part[taken], number[taken] = i, (now - now_rest)[taken]
            now, then, rest = now_rest, then_rest, rest - own
        return part, number
