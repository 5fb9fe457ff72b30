"""GRIT (Kosmos-2, arXiv 2306.14824): web images whose captions' noun phrases and expressions have boxes by a teacher.

An adapter as in `detections`.
"""

import pathlib
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated as Of
from typing import Any

import pydantic

from capvl.data.preparing.detections import Classes, Found
from capvl.data.preparing.regional import Annotated, Entity, Phrase
from capvl.data.reading.lookup import SUFFIXES
from capvl.data.reading.rejected import Rejected
from capvl.data.reading.rows import Caption, FormatError, Id, Number, Row, Rows
from capvl.errors import UserError
from capvl.lines import parse_json

COLUMNS = ("caption", "noun_chunks", "ref_exps")


def _rows(value: Any) -> Any:
    """Lists that a table has as text, too."""
    value = parse_json(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == 7 for row in value):
        raise ValueError("should be rows of seven numbers")
    return value


# First character, end, x0, y0, x1, y1, score.
_Chunk = tuple[Number, Number, Number, Number, Number, Number, Number]
_Chunks = Of[list[_Chunk], pydantic.BeforeValidator(_rows)]


class _Line(Row):
    caption: Caption
    noun_chunks: _Chunks
    ref_exps: _Chunks
    key: Id | None = None
    id: Id | None = None


def grit(split: str, left: Rejected, classes: Classes, *paths: str) -> Found:
    """GRIT: tars as img2dataset writes them, of images with JSON, or parquet files of the same rows, whose `key`, else
    `id`, is the name of the image's file. `noun_chunks` and `ref_exps` are rows of first character, end, x0, y0, x1, y1
    in fractions, and score. A box that several of them have is one thing with several phrases."""
    for path in paths:
        rows = Rows(path, left)
        found = False
        for place, value, image in _tar(path, left) if path.endswith(".tar") else _table(path):
            if (row := rows.one(_Line, value, rows.place(place))) is None:
                continue
            found = True
            name = image or row.key or row.id
            if name is None:
                raise FormatError(f"{path!r} has neither key nor id, which are its images' names")
            item = Annotated(name, row.key or row.id or place, "", None, (row.caption,), _entities(row))
            yield split, item._replace(fractions=True)
        if not found:
            why = "; ".join(f"{first[0]}: {reason}" for reason, (_, first) in left.items()) or "it is empty"
            raise FormatError(f"{path!r} has no row with {', '.join(COLUMNS)}: {why}")


def _entities(row: _Line) -> tuple[Entity, ...]:
    """Boxes by what names them: each box once."""
    spans: dict[tuple, dict[tuple[int, int], None]] = defaultdict(dict)
    scores: dict[tuple, float] = {}
    for start, end, *box, score in (*row.noun_chunks, *row.ref_exps):
        spans[tuple(box)][int(start), int(end)] = None
        scores[tuple(box)] = max(score, scores.get(tuple(box), 0.0))
    things: dict[tuple, list[tuple]] = defaultdict(list)
    for box, own in spans.items():
        things[tuple(sorted(own))].append(box)
    return tuple(
        Entity(
            tuple(boxes),
            tuple(Phrase(row.caption[s:e] if 0 <= s < e else "?", 0, s, e) for s, e in own),
            scores=tuple(scores[box] for box in boxes),
        )
        for own, boxes in things.items()
    )


def _tar(path: str, left: Rejected) -> Iterator[tuple[str, Any, str]]:
    """(key, its JSON, where its image lies in the tar) of the samples."""
    try:
        with tarfile.open(path, "r:") as archive:
            key, texts, image = "", None, ""
            for member in (*archive, None):
                stem, _, suffix = ("", "", "") if member is None else member.name.rpartition("/")[2].partition(".")
                if stem != key:
                    if key and texts is not None and image:
                        yield key, texts, image
                    elif key:
                        left.count("no image" if texts is not None else "no JSON", key)
                    key, texts, image = stem, None, ""
                if member is not None and suffix == "json":
                    try:
                        texts = parse_json(archive.extractfile(member).read().decode())
                    except ValueError:
                        left.count("is not JSON", key)
                elif member is not None and f".{suffix.lower()}" in SUFFIXES:
                    image = f"{path}#{member.offset_data}+{member.size}/{stem}.{suffix}"
    except (OSError, tarfile.TarError) as e:
        raise UserError(f"Annotation file {path!r} can't be read as a tar without compression: {e}.") from e


def _table(path: str) -> Iterator[tuple[str, Any, str]]:
    """(place, row, "") of a parquet file."""
    # Slow to import.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = set(file.schema_arrow.names)
            if missing := [name for name in COLUMNS if name not in known]:
                raise FormatError(f"{pathlib.PurePath(path).name} has no column {missing[0]!r}")
            number = 0
            for batch in file.iter_batches(columns=[name for name in (*COLUMNS, "key", "id") if name in known]):
                for row in batch.to_pylist():
                    yield f"row {number}", row, ""
                    number += 1
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"Annotation file {path!r} can't be read as parquet: {e}.") from e
