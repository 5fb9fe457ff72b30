"""Numbers of records that stand beside the files of a stream, so that these need not be read.

`NAME_stats.json` is img2dataset's (its `successes` are the samples of NAME.tar), `NAME.idx` is made by DALI's wds2idx
(its first line is "v1.2 SAMPLES"), and `sizes.json` {file: samples} is what users of WebDataset and open_clip put into
a folder.
"""

import concurrent.futures
import functools
import json
import re
from typing import Any, NamedTuple

from etils import epath

from capvl import storage
from capvl.data.reading import shard_files

THREADS = 32


class Told(NamedTuple):
    """Records of a file, and what told it."""

    records: int
    name: str


def counts(paths: list[str]) -> list[Told | None]:
    """What stands beside each of some files; None where there is nothing that can be used.

    Parquet and ArrayRecord files tell it themselves.
    """
    sizes = functools.cache(_json)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda path: _of_file(path, sizes), paths))


def _of_file(path: str, sizes) -> Told | None:
    if shard_files.kind(path) in (shard_files.PARQUET, shard_files.ARRAY_RECORD):
        return None
    folder, _, name = path.rpartition("/")
    folder = folder + "/" if folder or path.startswith("/") else ""
    stem = folder + (name.partition(".tar")[0] if ".tar" in name else name.rpartition(".")[0] or name)
    found = _number(_json(f"{stem}_stats.json"), "successes")
    if found is not None:
        return Told(found, f"{stem}_stats.json")
    if shard_files.kind(path) != shard_files.TFRECORD:  # Of those an .idx is something else.
        line = re.match(rb"v1\.\d+ (\d{1,15})\s*\n", _first(f"{stem}.idx"))
        if line:
            return Told(int(line[1]), f"{stem}.idx")
    found = _number(sizes(f"{folder}sizes.json"), name)
    return None if found is None else Told(found, f"{folder}sizes.json")


def _number(value: Any, key: str) -> int | None:
    found = value.get(key) if isinstance(value, dict) else None
    return found if type(found) is int and found >= 0 else None


def _first(path: str) -> bytes:
    """The first bytes of a file; none where there is none."""

    def read() -> bytes:
        with epath.Path(path).open("rb") as file:
            return file.read(64)

    try:
        return storage.retry(read, what=f"Reading {path!r}")
    except FileNotFoundError:
        return b""


def _json(path: str) -> Any:
    """The value of a JSON file; None where there is none that can be read."""
    try:
        return json.loads(storage.retry(epath.Path(path).read_bytes, what=f"Reading {path!r}"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
