"""Samples of img2dataset's and WebDataset's shards: tar or parquet, local or in a bucket."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from capvl import storage
from capvl.data.images import video
from capvl.data.reading import tars
from capvl.data.reading.records import IMAGE_SUFFIXES, TEXT_NAMES
from capvl.data.reading.tars import MAX_BYTES, TOO_LARGE, Count
from capvl.errors import UserError, nearest

NOT_UTF8 = "text is not UTF-8"
_IMAGE_NAMES = ("image", "img", "picture", "photo", "image_bytes", *IMAGE_SUFFIXES)
_FILM_NAMES = ("video", *(suffix for suffix in video.SUFFIXES if suffix not in IMAGE_SUFFIXES))


@dataclasses.dataclass(frozen=True)
class Names:
    """What holds the image and the captions, where that is not found by its name; see `capvl.data.reading.records`.

    Attributes:
      image: suffix of a member of a tar, or column of a parquet file.
      text: suffix of a member, key of the JSON, or column.
    """

    image: str = ""
    text: str = ""


NO_NAMES = Names()


def samples(path: str, max_bytes: int, count: Count, names: Names = NO_NAMES) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, suffix -> bytes) of each sample of a shard, in order.

    Args:
      path: of a .tar or .parquet file.
      max_bytes: of one member.
      count: told (reason, name) of what is left out here, also of the file itself where it can't be read (to the end).
      names: of what holds what.
    """
    if is_parquet(path):
        yield from _parquet(path, max_bytes, count, names)
    else:
        yield from _tar(path, max_bytes, count)


def tar_samples(path: str) -> Iterator[dict[str, bytes]]:
    """Samples {suffix: bytes} of a WebDataset tar, in order; members of a sample are neighbours.

    Raises:
      UserError: the file is missing or not a tar.
    """

    def fail(reason: str, name: str) -> None:
        if name == path:
            raise UserError(f"Shard {path!r} can't be read: {reason}.")

    yield from (members for _, members in samples(path, MAX_BYTES, fail))


def is_parquet(path: str) -> bool:
    """Whether a file is read as parquet."""
    return path.lower().endswith((".parquet", ".pq"))


def is_tar(path: str) -> bool:
    """Whether a file is a tar by its name, compressed or not."""
    return re.search(r"\.(tar(\.\w+)?|tgz|tbz2?|txz)$", path, re.IGNORECASE) is not None


def _tar(path: str, max_bytes: int, count: Count) -> Iterator[tuple[str, dict[str, bytes]]]:
    try:
        with epath.Path(path).open("rb") as file:
            yield from tars.samples(file, path, max_bytes, count)
    except Exception as e:  # Each kind of bucket has exceptions of its own.
        if storage.passes(e):
            raise
        count("file missing" if isinstance(e, FileNotFoundError) else tars.CUT, path)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns of a parquet file that are taken for what; "" for none."""

    image: str
    text: str
    films: tuple[str, ...]


def columns(path: str, names: Names = NO_NAMES) -> Columns:
    """Which columns of a parquet file are the image and the captions.

    An image is bytes, or Hugging Face's struct of `bytes` and `path`. Of several such columns the one is taken that is
    called image (img, jpg, png …); captions are `captions`, else the first of TEXT_NAMES.

    Raises:
      UserError: what was named is not there, or nothing says which of several columns is the image.
      Exception: pyarrow's and the storage's, where the file can't be read.
    """
    # Slow to import.
    import pyarrow.parquet

    with epath.Path(path).open("rb") as file:
        return _columns(pyarrow.parquet.read_schema(file), path, names)


def _columns(schema, path: str, names: Names) -> Columns:
    known = ", ".join(schema.names)
    for option, name in dataclasses.asdict(names).items():
        if name and name not in schema.names:
            raise UserError(
                f"{path!r} has no column {name!r} for --{option}, but {known}." + nearest(name, schema.names)
            )
    held = [field.name for field in schema if _holds_bytes(field.type)]
    films = tuple(name for name in held if name.lower() in _FILM_NAMES and name != names.image)
    held = [name for name in held if name not in films]
    called = [name for name in held if name.lower() in _IMAGE_NAMES]
    image = names.image or next(iter(called if len(called) == 1 else held if len(held) == 1 else ()), "")
    if not image and len(held) > 1:
        raise UserError(
            f"{path!r} has several columns of bytes, {', '.join(held)}, and nothing says which is the image; "
            "name it with --image=COLUMN (data.image in a recipe)."
        )
    if not image and not films:
        raise UserError(f"{path!r} has no column of bytes that could be the image; its columns are {known}.")
    lowered = {name.lower(): name for name in schema.names if name not in held}
    text = names.text or next((lowered[name] for name in ("captions", *TEXT_NAMES) if name in lowered), "")
    return Columns(image, text, films)


def _holds_bytes(kind) -> bool:
    """Whether a type is bytes, or a struct with `bytes`."""
    # Slow to import.
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    tests = ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")
    return any(getattr(pyarrow.types, test)(kind) for test in tests)


def _parquet(path: str, max_bytes: int, count: Count, names: Names) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Rows: the image as a member, every plain column as JSON."""
    # Slow to import.
    import pyarrow.parquet

    number = -1
    try:
        with epath.Path(path).open("rb") as file:
            for row in ParquetFile(file, path, names).rows():
                number += 1
                key, members, bad = row.sample(number, max_bytes)
                if bad:
                    count(bad, key)
                else:
                    yield key, members
    except UserError as e:
        count(str(e).rstrip("."), path)
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        if storage.passes(e):
            raise
        count("file missing" if isinstance(e, FileNotFoundError) else "parquet can't be read", path)


class ParquetRow(NamedTuple):
    """A row with what its file says of its columns; `values` is None where a text is not UTF-8."""

    values: dict[str, Any] | None
    file: "ParquetFile"

    def sample(self, number: int, max_bytes: int = MAX_BYTES) -> tuple[str, dict[str, bytes], str]:
        """(key, suffix -> bytes, why it is left out or "") of row `number` of its file."""
        name = f"{pathlib.PurePosixPath(self.file.path).stem}-{number:09d}"
        if self.values is None:
            return name, {}, NOT_UTF8
        key = str(name if self.values.get("key") in (None, "") else self.values["key"])
        members = _row_members(dict(self.values), self.file.columns, self.file.image)
        too_large = any(len(data) > max_bytes for data in members.values())
        return key, members, TOO_LARGE if too_large else ""


class ParquetFile:
    """An open parquet file, of which the columns are read that say something here."""

    def __init__(self, file, path: str, names: Names):
        """Reads the footer.

        Raises:
          UserError: see `columns`.
          Exception: pyarrow's and the storage's, where the file can't be read.
        """
        # Slow to import.
        import pyarrow.parquet

        self.path, self.image = path, names.image.lower() or "jpg"
        self._table = pyarrow.parquet.ParquetFile(file)
        self.columns = _columns(self._table.schema_arrow, path, names)
        chosen = (self.columns.image, *self.columns.films)
        self._wanted = [f.name for f in self._table.schema_arrow if not _holds_bytes(f.type)]
        self._wanted += [name for name in chosen if name and name not in self._wanted]

    def rows(self, group: int | None = None) -> Iterator[ParquetRow]:
        """Rows of the file, or of one row group."""
        groups = {} if group is None else {"row_groups": [group]}
        for batch in self._table.iter_batches(batch_size=64, columns=self._wanted, **groups):
            yield from (ParquetRow(row, self) for row in _rows(batch))


def group_sizes(file) -> list[int]:
    """Rows of each row group of an open parquet file.

    Raises:
      Exception: pyarrow's and the storage's, where the file can't be read.
    """
    # Slow to import.
    import pyarrow.parquet

    footer = pyarrow.parquet.read_metadata(file)
    return [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]


def _rows(batch) -> list[dict | None]:
    """Rows of a batch; None for those with texts that are not UTF-8, which Arrow does not check."""
    try:
        return batch.to_pylist()
    except ValueError:
        if len(batch) == 1:
            return [None]
        return [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]


def _row_members(row: dict, chosen: Columns, image: str) -> dict[str, bytes]:
    """A row as members of a tar, its image by the suffix `image`."""
    members = {}
    for suffix, column in ((image, chosen.image), *(("mp4", film) for film in chosen.films)):
        value = row.pop(column, None)
        value = value.get("bytes") if isinstance(value, dict) else value
        if value:
            members[suffix] = value
    rest = {name: value for name, value in row.items() if value is not None}
    if isinstance(rest.get(chosen.text), str):
        members["txt"] = rest[chosen.text].encode()
    return members | {"json": json.dumps(rest, ensure_ascii=False, default=_plain).encode()}


def _plain(value) -> str | None:
    """Dates and decimals as text; bytes say nothing in JSON."""
    return None if isinstance(value, bytes) else str(value)
