"""Samples of img2dataset's and WebDataset's shards: tar or parquet, local or in a bucket."""

import json
import pathlib
from collections.abc import Callable, Iterator

from etils import epath

from capvl import storage
from capvl.data.streams import IMAGE_SUFFIXES

Count = Callable[[str, str], None]
_TEXTS = ("caption", "txt", "text", "alt_text")


def samples(path: str, max_bytes: int, count: Count) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, suffix -> bytes) of each sample of a shard, in order.

    Args:
      path: of a .tar or .parquet file.
      max_bytes: of one member.
      count: told (reason, name) of what is left out here, also of the file itself where it can't be read (to the end).
    """
    yield from (_parquet if path.endswith(".parquet") else _tar)(path, max_bytes, count)


def _tar(path: str, max_bytes: int, count: Count) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Unsafe paths and oversized members are left out before they are read."""
    import tarfile

    key, members, bad = None, {}, ""
    try:
        with epath.Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                name = pathlib.PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    count("path climbs out", member.name)
                    continue
                stem, _, suffix = name.name.partition(".")
                stem = str(name.parent / stem)
                if stem != key:
                    if bad:
                        count(bad, key)
                    elif members:
                        yield key, members
                    key, members, bad = stem, {}, ""
                if member.size > max_bytes:
                    bad = "member too large"
                    continue
                members[suffix.lower()] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as e:
        if storage.passes(e):
            raise
        count("file missing" if isinstance(e, FileNotFoundError) else "tar cut short", path)
    if bad:
        count(bad, key)
    elif members:
        yield key, members


def _parquet(path: str, max_bytes: int, count: Count) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Rows with the image's bytes (in a column such as jpg, or Hugging Face's image.bytes) and a text."""
    import pyarrow
    import pyarrow.parquet

    number = -1
    try:
        with epath.Path(path).open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    key = str(row.get("key") or f"{pathlib.PurePosixPath(path).stem}-{number:09d}")
                    members = _row_members(row)
                    if any(len(data) > max_bytes for data in members.values()):
                        count("member too large", key)
                        continue
                    yield key, members
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException, OSError) as e:
        if storage.passes(e):
            raise
        count("file missing" if isinstance(e, FileNotFoundError) else "parquet can't be read", path)


def _row_members(row: dict) -> dict[str, bytes]:
    """A row as members of a tar: the image, the text, and every plain column as JSON."""
    members, rest = {}, {}
    for name, value in row.items():
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            value = value["bytes"]
        if isinstance(value, bytes):
            members[name if name in IMAGE_SUFFIXES else "jpg"] = value
        elif isinstance(value, str | int | float | bool | list):
            rest[name] = value
    text = next((rest[name] for name in _TEXTS if isinstance(rest.get(name), str)), "")
    return members | {"txt": text.encode(), "json": json.dumps(rest, ensure_ascii=False, default=str).encode()}
