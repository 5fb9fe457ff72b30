"""Files that streams read: how many records each has, where they begin, and one of them by its number.

Tar (WebDataset) and TFRecord files are read by ranges of bytes, ArrayRecord files by their own index, parquet by row
groups; a compressed tar is read as a whole.
"""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from capvl import storage
from capvl.data.reading import ranges, samples, tars
from capvl.data.reading.ranges import ChangedError
from capvl.data.reading.rejected import RejectedError
from capvl.errors import UserError

TAR, COMPRESSED, TFRECORD, PARQUET, ARRAY_RECORD = "tar", "compressed tar", "tfrecord", "parquet", "array_record"
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd."""
_HEAD = struct.Struct("<QL")
"""Of a TFRecord's record: its length and a checksum; behind its bytes stands another checksum."""
_FRAME = 16


@dataclasses.dataclass(frozen=True)
class Scan:
    """What a file holds.

    Attributes:
      kind: of the file.
      records: how many there are, those that can't be used too.
      offsets: (records + 1,) int64, where each begins and the last one ends; None where it isn't read by bytes.
      groups: rows of each row group of a parquet file.
      error: why there is nothing, or nothing behind these records; "".
    """

    kind: str
    records: int = 0
    offsets: np.ndarray | None = None
    groups: tuple[int, ...] = ()
    error: str = ""


def kind(path: str) -> str:
    """What a file is by its name; TFRecord where that says nothing."""
    if samples.is_parquet(path):
        return PARQUET
    if ".array_record" in pathlib.PurePath(path).name:
        return ARRAY_RECORD
    if samples.is_tar(path):
        return TAR if path.lower().endswith(".tar") else COMPRESSED
    return TFRECORD


def scan(path: str) -> Scan:
    """What a file holds, by its footer or by reading it.

    Raises:
      UserError: the storage failed every time.
    """
    said = kind(path)
    try:
        return storage.retry(
            {PARQUET: _scan_parquet, ARRAY_RECORD: _scan_array_record}.get(said, _scan),
            path,
            what=f"Reading shard {path!r}",
        )
    except UserError:
        raise
    except FileNotFoundError:
        return Scan(said, error="file missing")
    except Exception as e:  # Each library has exceptions of its own.
        return Scan(said, error=f"can't be read: {storage.reason(e)}")


def _scan_parquet(path: str) -> Scan:
    with epath.Path(path).open("rb") as file:
        groups = samples.group_sizes(file)
    return Scan(PARQUET, sum(groups), groups=tuple(groups))


def _scan_array_record(path: str) -> Scan:
    with _array_record(path) as reader:
        return Scan(ARRAY_RECORD, reader.num_records())


def _scan(path: str) -> Scan:
    with epath.Path(path).open("rb") as file:
        if kind(path) == TFRECORD:
            return _scan_tfrecord(file)
        packed = file.read(6).startswith(_PACKED)
        file.seek(0)
        offsets, error = tars.offsets(file, packed)
    if packed:
        return Scan(COMPRESSED, len(offsets) - 1, error=error)
    return Scan(TAR, len(offsets) - 1, np.array(offsets, np.int64), error=error)


def _scan_tfrecord(file) -> Scan:
    size, at, offsets = file.seek(0, 2), 0, [0]
    while at < size:
        file.seek(at)
        head = file.read(_HEAD.size)
        if len(head) == _HEAD.size:
            at += _HEAD.unpack(head)[0] + _FRAME
        if len(head) < _HEAD.size or at > size:
            count = len(offsets) - 1
            error = f"cut short or no TFRecord after {count} records"
            return Scan(TFRECORD, count, np.array(offsets, np.int64), error=error)
        offsets.append(at)
    return Scan(TFRECORD, len(offsets) - 1, np.array(offsets, np.int64))


@contextlib.contextmanager
def _array_record(path: str) -> Iterator[Any]:
    """An open reader of an ArrayRecord file; in a bucket it is copied first."""
    # Slow to import.
    from array_record.python.array_record_module import ArrayRecordReader

    with storage.local_copy(epath.Path(path)) as local:
        reader = ArrayRecordReader(local)
        try:
            yield reader
        finally:
            reader.close()


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file with what is known of it; see `Scan`."""

    path: str
    bytes: int
    kind: str
    records: int
    offsets: np.ndarray | None = None
    groups: tuple[int, ...] = ()


class Held:
    """Pieces that can only be read as a whole, the latest `most` of them."""

    def __init__(self, most: int, names: samples.Names):
        self._most, self._names = most, names
        self._lock = threading.Lock()
        self._held: dict[tuple[str, int], concurrent.futures.Future] = {}

    def __call__(self, shard: Shard, group: int) -> list[Any]:
        """All records of a row group, or of a compressed tar."""
        with self._lock:
            key = (shard.path, group)
            future = self._held.pop(key, None)
            reads = future is None
            future = concurrent.futures.Future() if future is None else future
            self._held[key] = future
            while len(self._held) > self._most:
                self._held.pop(next(iter(self._held)))
        if reads:
            try:
                future.set_result(storage.retry(self._read, shard, group, what=f"Reading {shard.path!r}"))
            except BaseException as e:
                with self._lock:
                    self._held.pop(key, None)
                future.set_exception(e)
        return future.result()

    def _read(self, shard: Shard, group: int) -> list[Any]:
        if shard.kind == PARQUET:
            try:
                with epath.Path(shard.path).open("rb") as file:
                    return list(samples.ParquetFile(file, shard.path, self._names).rows(group))
            except UserError as e:  # Of this file's columns.
                raise RejectedError(str(e).rstrip(".")) from e
        found: list[Any] = []

        def count(reason: str, name: str) -> None:
            if reason == tars.TOO_LARGE:
                found.append(RejectedError(reason))

        for sample in samples.samples(shard.path, tars.MAX_BYTES, count):
            found.append(sample)
        return found


def read_together(shard: Shard, numbers: Sequence[int]) -> list[list[int]]:
    """Records of a file, ascending, by which of them are read at once."""
    numbers = list(numbers)
    if shard.offsets is not None:
        begins, ends = shard.offsets[numbers], shard.offsets[np.array(numbers) + 1]
        return [numbers[first:last] for first, last in ranges.merged(begins, ends)]
    if shard.groups:
        edges = np.searchsorted(numbers, np.cumsum(shard.groups))
        return [own for own in (list(part) for part in np.split(np.array(numbers), edges)) if own]
    return [numbers]


def read(shard: Shard, numbers: Sequence[int], held: Held) -> list[Any]:
    """Records of a file, as they stand in it.

    Args:
      shard: the file.
      numbers: of records, ascending, such as `read_together` gives.
      held: of this stream.

    Raises:
      ChangedError: the file is no longer what it was.
      UserError: its columns don't say what is what; the storage failed every time.
      Exception: of the libraries and the storage, where it can't be read.
    """
    if shard.offsets is not None:
        begins, ends = shard.offsets[list(numbers)], shard.offsets[np.array(numbers) + 1]
        data = memoryview(ranges.read(shard.path, int(begins[0]), int(ends[-1]), shard.bytes))
        return [bytes(data[b - begins[0] : e - begins[0]]) for b, e in zip(begins, ends, strict=True)]
    found = ranges.stat(shard.path)
    if found is None:
        raise ChangedError("it is gone")
    if found.bytes != shard.bytes:
        raise ChangedError(f"it has {found.bytes:,} bytes and had {shard.bytes:,}")
    if shard.kind == ARRAY_RECORD:
        return storage.retry(_read_array_record, shard, numbers, what=f"Reading {shard.path!r}")
    group = int(np.searchsorted(np.cumsum(shard.groups), numbers[0], side="right")) if shard.groups else 0
    whole, first = held(shard, group), sum(shard.groups[:group])
    if numbers[-1] - first >= len(whole):
        raise ChangedError(f"it has no record {numbers[-1]}")
    return [whole[number - first] for number in numbers]


def _read_array_record(shard: Shard, numbers: Sequence[int]) -> list[bytes]:
    with _array_record(shard.path) as reader:
        if reader.num_records() != shard.records:
            raise ChangedError(f"it has {reader.num_records()} records and had {shard.records}")
        return reader.read([int(number) for number in numbers])


def tfrecord_data(raw: bytes) -> bytes:
    """What is in a record of a TFRecord file.

    Raises:
      ChangedError: no record of this length begins there.
    """
    if _HEAD.unpack_from(raw)[0] != len(raw) - _FRAME:
        raise ChangedError("a record doesn't begin where it should")
    return raw[_HEAD.size : -4]
