"""What is known of the files of a stream: how many records each has, and where they begin.

A folder holds `index.json`, an entry a file, and `offsets/`, an array of a file each. It is made once, without reading
a file where something beside it tells its number of records, and compared with the files at each start.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from capvl import storage
from capvl.data.reading import ranges, shard_files, side_counts
from capvl.data.reading.patterns import below
from capvl.data.reading.shard_files import Scan, Shard
from capvl.data.reading.stream_order import pieces
from capvl.errors import UserError

TOLD = 3
THREADS = 32
SLOW = 10.0
"""Seconds of indexing from which on processes are worth their start."""
_HELD = 1024
"""Files whose offsets are held in memory."""

Spread = Callable[[Callable[[Any], None], Sequence[Any]], None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file of an index.

    Attributes:
      name: below the folder that all files have in common.
      bytes, stamp: of the file as it was indexed; -1 and "" for one that was not there.
      kind, records, groups, error: see `shard_files.Scan`.
      source: what told the number of records, where the file itself was not read.
    """

    name: str
    bytes: int = -1
    stamp: str = ""
    kind: str = shard_files.TFRECORD
    records: int = 0
    groups: tuple[int, ...] = ()
    error: str = ""
    source: str = ""

    def digest(self) -> str:
        """What its offsets are called."""
        return _digest(f"{self.name} {self.bytes} {self.stamp}")

    def pieces(self) -> list[int]:
        """Sizes of the pieces into which its records are cut."""
        if self.groups:
            return list(self.groups)
        return [self.records] if self.kind == shard_files.COMPRESSED else pieces(self.records)


def folder_of(pattern: str, chosen: str, data_dir: str, *, alone: bool) -> str:
    """Where a stream's index is.

    Args:
      pattern: of the stream.
      chosen: the folder that `data.index` names; "" for one in the data directory.
      data_dir: the data directory.
      alone: whether the chosen one is that of this stream, and not of several.
    """
    if chosen and alone:
        return os.path.expanduser(chosen)
    return f"{os.path.expanduser(chosen).rstrip('/') or data_dir + '/stream_index'}/{_digest(pattern)}"


class Index:
    """The files of a stream, in their order."""

    def __init__(self, files: list[str], entries: list[Entry], folder: str):
        """folder: of the offsets; "" for none."""
        self.files, self.entries, self._folder = files, entries, folder
        self._starts = np.cumsum([0, *(entry.records for entry in entries)])
        self._shards: collections.OrderedDict[int, Shard] = collections.OrderedDict()
        self._lock, self._locks = threading.Lock(), collections.defaultdict(threading.Lock)

    @property
    def records(self) -> int:
        """Of all files."""
        return int(self._starts[-1])

    def pieces(self) -> list[int]:
        """Sizes of the pieces of all files."""
        return [size for entry in self.entries for size in entry.pieces()]

    def digest(self) -> str:
        """Of all that an order is computed from."""
        return hashlib.blake2b(np.array(self.pieces(), np.int64).tobytes(), digest_size=10).hexdigest()

    def place(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(file, number in it) of records, counted over all files."""
        file = np.searchsorted(self._starts, records, side="right") - 1
        return file, records - self._starts[file]

    def shard(self, file: int) -> Shard:
        """A file with its offsets, which are found out where it hasn't been read yet."""
        with self._lock:
            if file in self._shards:
                self._shards.move_to_end(file)
                return self._shards[file]
            lock = self._locks[file]
        with lock:
            if file not in self._shards:
                shard = self._open(file)
                with self._lock:
                    self._shards[file] = shard
                    while len(self._shards) > _HELD:
                        self._shards.popitem(last=False)
            return self._shards[file]

    def _open(self, file: int) -> Shard:
        path, entry = self.files[file], self.entries[file]
        offsets, kind, records = None, entry.kind, entry.records
        if kind in (shard_files.TAR, shard_files.TFRECORD) and records:
            offsets = _load(self._folder, entry) if self._folder else None
            if offsets is None:
                scan = shard_files.scan(path)
                offsets, kind, records = scan.offsets, scan.kind, scan.records
                if records != entry.records:
                    by = f", as {entry.source} says" if entry.source else ""
                    why = f" ({scan.error})" if scan.error else ""
                    _say(
                        f"{path!r} has {records:,} records{why} and not {entry.records:,}{by}: those that aren't there "
                        "are bad, those beyond are not read. Make the index anew with "
                        "`python -m capvl.data.prepare index --scan`."
                    )
                elif self._folder and offsets is not None:
                    _keep(self._folder, entry, offsets)
        return Shard(path, entry.bytes, kind, records, offsets, entry.groups)


def open_index(
    pattern: str,
    files: list[str],
    folder: str,
    *,
    scan: bool = False,
    workers: int = 0,
    spread: Spread | None = None,
    must_keep: bool = False,
) -> Index:
    """The index of a stream, made or brought up to date.

    Args:
      pattern: of the stream.
      files: of the pattern.
      folder: where the index is kept.
      scan: read each file, also where something beside it says how many records it has, and whether or not it changed.
      workers: processes, where many files are to be read; 0 for one a core.
      spread: calls a function for each of some jobs somewhere else.
      must_keep: that the index can't be kept is an error.

    Raises:
      UserError: the folder holds something else, or the index of other files.
    """
    names = below(files)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        stats = list(pool.map(ranges.stat, files))
    old = _read(folder)
    if old and not set(names) & set(old):
        raise UserError(
            f"{folder!r} is the index of other files ({next(iter(old))!r} and {len(old) - 1} more) than {pattern!r} "
            f"names ({names[0]!r} …); say another folder, or remove it."
        )
    entries: dict[str, Entry] = {}
    wanted, changes = [], collections.defaultdict(list)
    for name, path, now in zip(names, files, stats, strict=True):
        before = old.get(name)
        if now is None:
            entries[name] = before or Entry(name, kind=shard_files.kind(path), error="file missing")
            if before and before.bytes >= 0:
                changes["is missing: its records count as bad"].append(path)
        elif before and (before.bytes, before.stamp) == now and not (scan and before.source):
            entries[name] = before
        else:
            wanted.append((path, Entry(name, *now)))
            if old and before is None:
                changes["was added"].append(path)
            elif before and (before.bytes, before.stamp) != now:
                changes["changed, and is indexed again" if before.bytes >= 0 else "was added"].append(path)
    changes["is no longer among the files"] = [name for name in old if name not in set(names)]
    for what, which in changes.items():
        _say(*(f"{path!r} {what}." for path in which[:TOLD]))
        if len(which) > TOLD:
            _say(f"… and {len(which) - TOLD:,} more files: {what}.")
    keeps = _makes_folder(folder, must_keep) if wanted else True
    made = _make(pattern, wanted, folder if keeps else "", scan=scan, workers=workers, spread=spread)
    found = [made.get(name) or entries[name] for name in names]
    if keeps and (wanted or len(old) != len(names)):
        _write(folder, pattern, found)
    return Index(files, found, folder if keeps else "")


def _make(pattern: str, wanted: list[tuple[str, Entry]], folder: str, *, scan, workers, spread) -> dict[str, Entry]:
    """Entries of files that are not known yet, by name."""
    told = [None] * len(wanted) if scan else side_counts.counts([path for path, _ in wanted])
    made, jobs = {}, []
    for (path, entry), said in zip(wanted, told, strict=True):
        if said:
            kind = shard_files.kind(path)
            made[entry.name] = dataclasses.replace(entry, kind=kind, records=said.records, source=said.name)
        else:
            jobs.append((path, dataclasses.asdict(entry), folder))
    if spread and jobs:
        spread(_job, jobs)  # And then they are there.
    began, total = time.monotonic(), sum(entry["bytes"] for _, entry, _ in jobs)
    processes = min(workers or os.cpu_count() or 1, len(jobs))
    for done, job in enumerate(jobs):
        made[job[1]["name"]] = _job(job)
        seconds = (time.monotonic() - began) * (len(jobs) / (done + 1) - 1) / processes
        if seconds > SLOW:
            _say(
                f"Of {pattern!r} {len(jobs):,} files ({total / 1e9:,.1f} GB) are read once for their index in "
                f"{processes} processes, for about {max(1, round(seconds / 60)):,} min; it is kept in {folder!r}."
            )
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
                rest = jobs[done + 1 :]
                made |= {entry.name: entry for entry in pool.map(_job, rest, chunksize=1)}
            break
    return made


def _job(job: tuple[str, dict, str]) -> Entry:
    """Reads a file for its entry; both are kept in the folder, for runs that are interrupted and for other machines."""
    path, known, folder = job
    known = Entry(**known | {"groups": tuple(known["groups"])})
    if folder and (done := _part(folder, known)):
        return done
    scan: Scan = shard_files.scan(path)
    entry = dataclasses.replace(known, kind=scan.kind, records=scan.records, groups=scan.groups, error=scan.error)
    if folder:
        if scan.offsets is not None:
            _keep(folder, entry, scan.offsets)
        part = _part_file(folder, entry)
        storage.make_folder(part.parent)
        storage.replace_text(part, json.dumps(dataclasses.asdict(entry)))
    return entry


def _part_file(folder: str, entry: Entry) -> epath.Path:
    return epath.Path(folder) / "parts" / f"{entry.digest()}.json"


def _part(folder: str, known: Entry) -> Entry | None:
    """The entry that `_job` kept."""
    try:
        return _entry(json.loads(_part_file(folder, known).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _offsets_file(folder: str, entry: Entry) -> epath.Path:
    return epath.Path(folder) / "offsets" / f"{entry.digest()}.npy"


def _keep(folder: str, entry: Entry, offsets: np.ndarray) -> None:
    file, data = _offsets_file(folder, entry), io.BytesIO()
    storage.make_folder(file.parent)
    np.save(data, offsets, allow_pickle=False)
    storage.replace_bytes(file, data.getvalue())


def _load(folder: str, entry: Entry) -> np.ndarray | None:
    """Offsets of a file; None where there are none that fit."""
    try:
        data = storage.retry(_offsets_file(folder, entry).read_bytes, what="Reading the index of a stream")
        offsets = np.load(io.BytesIO(data), allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    fits = offsets.dtype == np.int64 and offsets.shape == (entry.records + 1,) and (np.diff(offsets) > 0).all()
    return offsets if fits else None


_VERSION = 1


def _write(folder: str, pattern: str, entries: list[Entry]) -> None:
    kept = [dataclasses.asdict(entry) for entry in entries]
    text = json.dumps({"version": _VERSION, "pattern": pattern, "files": kept})
    storage.replace_text(epath.Path(folder) / "index.json", text)
    with contextlib.suppress(OSError):  # Another host may have done so.
        (epath.Path(folder) / "parts").rmtree()


def _read(folder: str) -> dict[str, Entry]:
    """Entries of an index by name; {} where there is none yet.

    Raises:
      UserError: it is something else.
    """
    file = storage.folder(folder) / "index.json"
    if not file.exists():
        return {}
    value = storage.read_json(file)
    try:
        if value["version"] != _VERSION:
            raise ValueError("another version")
        return {entry.name: entry for entry in map(_entry, value["files"])}
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{str(file)!r} is no index of a stream, or of another version of capvl; remove it.") from e


def _entry(value: dict[str, Any]) -> Entry:
    """Of plain values.

    Raises:
      ValueError, TypeError: they are none.
    """
    entry = Entry(**value | {"groups": tuple(value["groups"])})
    for field in dataclasses.fields(Entry):
        wanted = {"groups": tuple}.get(field.name, type(field.default) if field.name != "name" else str)
        if type(getattr(entry, field.name)) is not wanted:
            raise ValueError(field.name)
    if entry.records < 0 or not all(type(rows) is int and rows >= 0 for rows in entry.groups):
        raise ValueError("records")
    return entry


def _makes_folder(folder: str, must: bool) -> bool:
    """Whether an index can be kept; says so where it can't."""
    try:
        storage.make_folder(storage.folder(folder) / "parts")
        storage.replace_text(storage.folder(folder) / "parts" / "begun", "")
    except UserError as e:
        if must:
            raise
        _say(f"The index of the stream is not kept and will be made at each start: {e}")
        return False
    return True


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=10).hexdigest()


def _say(*lines: str) -> None:
    for line in lines:
        print(f"Index of the stream: {line}", flush=True)
