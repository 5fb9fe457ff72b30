"""Bytes of files of streams, wherever they lie: the one place where they are read."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from capvl import storage

LARGEST = 2**23
"""Bytes that are read at once."""
WASTE = 0.05
"""Bytes between records that may be read over, as a share of those of the records."""


class ChangedError(Exception):
    """A file is no longer what it was when it was indexed; the message says in what."""


class Stat(NamedTuple):
    """Bytes of a file, and what is another one when it is written anew."""

    bytes: int
    stamp: str


def stat(path: str) -> Stat | None:
    """Of a file; None where there is none.

    Raises:
      UserError: the storage failed every time.
      Exception: of the storage, which doesn't pass.
    """

    def ask() -> Stat:
        if not storage.in_bucket(path):
            found = os.stat(path)
            return Stat(found.st_size, str(found.st_mtime_ns))
        found = epath.Path(path).stat()
        return Stat(found.length, str(found.mtime))

    try:
        return storage.retry(ask, what=f"Reading {path!r}")
    except FileNotFoundError:
        return None


def read(path: str, begin: int, end: int, size: int) -> bytes:
    """Bytes begin … end - 1 of a file.

    Args:
      path: of the file.
      begin, end: which ones.
      size: of the whole file as it was indexed.

    Raises:
      ChangedError: the file has another size, or is gone.
      UserError: the storage failed every time.
      Exception: of the storage, which doesn't pass.
    """

    def ask() -> bytes:
        with epath.Path(path).open("rb") as file:
            if (now := file.seek(0, os.SEEK_END)) != size:
                raise ChangedError(f"it has {now:,} bytes and had {size:,}")
            file.seek(begin)
            return file.read(end - begin)

    try:
        data = storage.retry(ask, what=f"Reading {path!r}")
    except FileNotFoundError as e:
        raise ChangedError("it is gone") from e
    if len(data) != end - begin:
        raise ChangedError(f"it ends at {begin + len(data):,} bytes")
    return data


def merged(begins: Sequence[int], ends: Sequence[int], largest: int = LARGEST) -> list[tuple[int, int]]:
    """Records that are read together, as (first, one behind the last) of them: neighbours, and those with the smallest
    gaps between them, as long as all gaps are at most WASTE of what is wanted.

    Args:
      begins, ends: bytes at which each record begins and ends, ascending.
      largest: bytes of a range, unless one record has more.
    """
    begins, ends = np.asarray(begins), np.asarray(ends)
    gaps = begins[1:] - ends[:-1]
    order = np.argsort(gaps, kind="stable")
    affordable = np.cumsum(gaps[order]) <= WASTE * (ends - begins).sum()
    joined = np.zeros(len(gaps), bool)
    joined[order[affordable]] = True
    found, first = [], 0
    for i in range(1, len(begins) + 1):
        if i == len(begins) or not joined[i - 1] or ends[i] - begins[first] > largest:
            found.append((first, i))
            first = i
    return found
