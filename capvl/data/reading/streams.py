"""Streams: tar (WebDataset), parquet, TFRecord and ArrayRecord files as a part of what is trained on.

Which record is example n is computed (`stream_order`) from numbers of records (`stream_index`). Records are read ahead
of need, a block's neighbours together. One that can't be used is replaced by another of its block, as a function of
(seed, n): so all hosts, and runs that are resumed, put the same one in its place.
"""

import collections
import concurrent.futures
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from capvl import storage
from capvl.data.images.decode import BadImageError
from capvl.data.randomness import Uniforms, replacement
from capvl.data.reading import shard_files, stream_index
from capvl.data.reading.patterns import expand
from capvl.data.reading.ranges import ChangedError
from capvl.data.reading.rejected import RejectedError
from capvl.data.reading.samples import Names
from capvl.data.reading.shard_examples import Examples
from capvl.data.reading.stream_order import Block, StreamOrder
from capvl.data.reading.texts import without_text
from capvl.errors import UserError

PREFIX = "stream:"
ATTEMPTS = 10
"""Records of a block that are tried in the place of a bad one."""
BLOCKS = 19
"""Further blocks where all of these are bad."""
CHECKED = 1000
CHANGED = "no longer what its index says, and its records count as bad"
TOLD = 5
_BAD = (BadImageError, RejectedError, ChangedError)


class Row(NamedTuple):
    """An example: its number over all parts of a mixture, and its place in the stream."""

    n: int
    epoch: int
    lane: int
    block: int
    record: int


class Job(NamedTuple):
    """Something to be read, and the first example that needs it."""

    n: int
    call: Callable[[concurrent.futures.Executor | None], None]


class _Waited:
    """Records that are being read, by number; what can't be read is there as its error."""

    def __init__(self):
        self._condition, self._values = threading.Condition(), {}

    def put(self, records, values) -> None:
        with self._condition:
            self._values.update(zip(records, values, strict=True))
            self._condition.notify_all()

    def take(self, record: int) -> Any:
        with self._condition:
            self._condition.wait_for(lambda: record in self._values)
            return self._values.pop(record)


class Stream:
    """See the module's text."""

    def __init__(
        self, pattern: str, options, features: tuple[str, ...], *, seed: int, empty_images=False, alone: bool = True
    ):
        """Opens the index and makes it where there is none.

        Args:
          pattern: of the files.
          options: `config.data` (`capvl.data.options.DataOptions`).
          features: that the objective asks for; samples without a text that it needs are bad.
          seed: of the order.
          empty_images: whether images without a text are used all the same.
          alone: whether `data.index` is the folder of this stream, and not of several.

        Raises:
          UserError: no files, no records, or the index of other files.
        """
        self.pattern, self.name, self.features, self.empty_images = pattern, PREFIX + pattern, features, empty_images
        folder = stream_index.folder_of(pattern, options.index, options.directory(), alone=alone)
        self.index = stream_index.open_index(pattern, expand(pattern), folder)
        self._lock, self.bad = threading.Lock(), collections.Counter()
        self._told: dict[str, set[str]] = collections.defaultdict(set)
        errors = [(entry.error, path) for entry, path in zip(self.index.entries, self.index.files, strict=True)]
        for error, path in errors:
            if error:
                self._tell(error, path)
        if not self.index.records:
            reasons = collections.Counter(error or "no record" for error, _ in errors)
            raise UserError(f"No sample of {pattern!r} can be used: {_listed(reasons)}.")
        self.order = StreamOrder(self.index.pieces(), seed, lanes=options.readers, window=options.window)
        names = Names(options.image, options.text)
        fields = options.fields() if names.image or names.text else None
        self._examples, self._held = Examples(names, features, fields), shard_files.Held(2 * self.order.lanes, names)
        self._waited: dict[tuple[int, int], _Waited] = {}

    def __len__(self) -> int:
        return self.order.size

    def check(self) -> None:
        """Raises UserError where none of CHECKED records, evenly spread, can be used; one is enough."""
        reasons: collections.Counter[str] = collections.Counter()
        count = min(CHECKED, len(self))
        for i in range(count):
            record = i * len(self) // count
            try:
                self.read(record)
                return
            except _BAD as e:
                reasons[str(e)] += 1
        raise UserError(f"No sample of {self.pattern!r} can be used: {_listed(reasons)}.")

    def read(self, record: int) -> dict[str, Any]:
        """The Example of a record, counted over all files.

        Raises:
          RejectedError, ChangedError: it can't be used, or isn't there.
          UserError: the storage failed every time.
        """
        return self._example(record, self._read(record))

    def fetch(self, block: Block, numbers: np.ndarray, records: np.ndarray) -> list[Job]:
        """What is to be read of a block, of each file by itself.

        Args:
          block: which one.
          numbers: (n,) of the examples that need something of it.
          records: (n,) which they need.
        """
        order = np.argsort(records)
        records, numbers = records[order], numbers[order]
        files, _ = self.index.place(records)
        jobs = []
        for own in np.split(np.arange(len(files)), np.flatnonzero(np.diff(files)) + 1):
            waited = _Waited()
            with self._lock:
                self._waited.update({(block[0], int(record)): waited for record in records[own]})
            jobs.append(
                Job(int(numbers[own].min()), functools.partial(self._fetch, int(files[own[0]]), records[own], waited))
            )
        return jobs

    def example(self, row: Row, transform, seed: int) -> dict[str, Any]:
        """An example, and as `bad` whether another record is in its place.

        Args:
          row: which one; it was asked for by `fetch`.
          transform: the objective's.
          seed: of the augmentation.

        Raises:
          UserError: there are too many bad ones in a row, or the storage failed.
        """
        with self._lock:
            waited = self._waited.pop((row.epoch, row.record))
        record, raw = row.record, waited.take(row.record)
        for attempt in range(ATTEMPTS * (1 + BLOCKS)):
            try:
                example = self._example(record, raw)
                return transform(example, Uniforms(seed, row.n)) | {"bad": np.int32(attempt > 0)}
            except _BAD as e:
                last = e
                self._note(record, e, first=not attempt)
            record = self._instead(row, attempt)
            raw = self._read(record)
        raise UserError(f"{attempt + 1} examples in a row of {self.name!r} are bad; the last: {last}")

    def worst(self) -> str:
        """The files with most bad records, in words."""
        return ", ".join(f"{path} ({count:,})" for path, count in self.bad.most_common(3))

    def _instead(self, row: Row, attempt: int) -> int:
        """The record that is tried after so many bad ones: of the same block, then of others of this epoch."""
        block, other = (row.epoch, row.lane, row.block), (attempt + 1) // ATTEMPTS
        if other:
            position = replacement(self.order.seed, self.order.last(block), other, len(self))
            block = self.order.block_of(row.epoch, position)
        records = self.order.records(block)
        return int(records[replacement(self.order.seed, row.n, attempt, len(records))])

    def _example(self, record: int, raw: Any) -> dict[str, Any]:
        """The Example of a record, without blanks among its captions."""
        if isinstance(raw, BaseException):
            raise raw
        file, number = self._place(record)
        example = self._examples(self.index.shard(file), number, raw)
        if without_text(example, self.features) and not self.empty_images:
            raise RejectedError("no text", example["key"])
        texts = example.get("text")
        if isinstance(texts, list) and not all(text.strip() for text in texts):
            example["text"] = [text for text in texts if text.strip()]
        return example

    def _read(self, record: int) -> Any:
        """A record as it stands, or why it can't be read."""
        file, _ = self._place(record)
        waited = _Waited()
        self._fetch(file, np.array([record]), waited, None)
        return waited.take(record)

    def _fetch(self, file: int, records: np.ndarray, waited: _Waited, pool: concurrent.futures.Executor | None) -> None:
        """Puts records (n,) of a file, ascending, where they are waited for: whatever happens, something is put."""
        try:
            shard = self.index.shard(file)
            numbers = self.index.place(records)[1]
            there = numbers < shard.records
            absent = [ChangedError(f"it has no record {number}") for number in numbers[~there]]
            waited.put(records[~there], absent)
            together = shard_files.read_together(shard, numbers[there]) if there.any() else []
        except BaseException as e:
            waited.put(records, [e] * len(records))
            return
        first = int(records[0] - numbers[0])
        for group in together:
            read = functools.partial(self._read_group, shard, group, first, waited)
            try:
                if pool is None or len(together) == 1:
                    read()
                else:
                    pool.submit(read)
            except RuntimeError:  # Nothing may be submitted any more: this process ends.
                read()

    def _read_group(self, shard: shard_files.Shard, numbers: list[int], first: int, waited: _Waited) -> None:
        try:
            values = shard_files.read(shard, numbers, self._held)
        except (UserError, *_BAD) as e:
            values = [e] * len(numbers)
        except Exception as e:  # Each library has exceptions of its own.
            values = [RejectedError(f"can't be read: {storage.reason(e)}")] * len(numbers)
        waited.put([first + int(number) for number in numbers], values)

    def _place(self, record: int) -> tuple[int, int]:
        file, number = self.index.place(np.array(record))
        return int(file), int(number)

    def _note(self, record: int, error: Exception, first: bool) -> None:
        """Counts a bad record and says the first ones of each reason."""
        file, number = self._place(record)
        path = self.index.files[file]
        with self._lock:
            self.bad[path] += first
        if isinstance(error, ChangedError):
            self._tell(CHANGED, path, f": {error}")
        elif isinstance(error, RejectedError):
            self._tell(str(error), f"{path}: {error.key or number}")

    def _tell(self, reason: str, name: str, more: str = "") -> None:
        """One line for the first of each reason."""
        with self._lock:
            told = self._told[reason]
            if name not in told and len(told) < TOLD:
                told.add(name)
                more += " (further ones are only counted)" if len(told) == TOLD else ""
                print(f"Left out of the stream: {name}: {reason}{more}", flush=True)


def _listed(reasons: collections.Counter[str]) -> str:
    return ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common(TOLD))
