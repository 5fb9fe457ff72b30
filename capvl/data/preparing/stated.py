"""Annotation files of statements about images, which hold or don't: SNLI-VE, NLVR2 (`.annotations` has the index).

A statement is a question whose answer is the label's name.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic

from capvl.data.reading.rejected import Rejected
from capvl.data.reading.rows import Asked, Id, Item, Items, Row, Rows, Text
from capvl.lines import parse_json

ENTAILMENT = ("entailment", "neutral", "contradiction")
UNDECIDED = "-"


class Pair(Row):
    """A row of SNLI-VE, which names the image, and before "#" in the caption's id; or of our own keys."""

    image: Id = pydantic.Field(
        validation_alias=pydantic.AliasChoices("image_id", "Flickr30K_ID", "image", "key", "captionID")
    )
    text: Text = pydantic.Field(validation_alias=pydantic.AliasChoices("hypothesis", "sentence2"))
    label: Literal[*ENTAILMENT, UNDECIDED] = pydantic.Field(
        validation_alias=pydantic.AliasChoices("label", "gold_label")
    )
    id: Id = pydantic.Field(default="", validation_alias=pydantic.AliasChoices("pair_id", "pairID"))

    @pydantic.field_validator("image")
    @classmethod
    def _of_caption(cls, value: str) -> str:
        return value.partition("#")[0]


def snli_ve(split: str, left: Rejected, path: str) -> Items:
    """SNLI-VE (arXiv 1901.06706): JSON lines {"Flickr30K_ID", "sentence2", "gold_label", "pairID"}, all statements
    about an image together; those without a gold label ("-") are left out."""
    rows, stated = Rows(path, left), defaultdict(list)
    for number, (place, value) in enumerate(_objects(rows)):
        row = rows.one(Pair, value, place)
        if row is None:
            continue
        if row.label == UNDECIDED:
            left.count("has no gold label", place)
            continue
        stated[row.image].append(Asked(row.id or str(number), row.text, (row.label,)))
    for image, of_image in stated.items():
        yield split, Item(image, image, questions=tuple(of_image))


def _as_label(value: Any) -> Any:
    return str(value) if isinstance(value, bool) else value


class _Nlvr(Row):
    sentence: Text
    label: Annotated[Literal["True", "False"] | None, pydantic.BeforeValidator(_as_label)] = None
    identifier: Id = ""
    images: tuple[Id, Id] | None = None

    @pydantic.model_validator(mode="after")
    def _named(self):
        if self.images is None and len(self.identifier.split("-")) != 4:
            raise ValueError("identifier should read SPLIT-SET-PAIR-SENTENCE, or images name two")
        return self


def nlvr2(split: str, left: Rejected, path: str) -> Items:
    """NLVR2 (arXiv 1811.00491): JSON lines {"identifier", "sentence", "label"}, whose images are IDENTIFIER without the
    sentence's number, and -img0.png (left) and -img1.png; or a JSON list of {"images": [left, right], "sentence",
    "label"}, as X-VLM's code has it. Those of hidden tests have no label."""
    rows, pairs = Rows(path, left), defaultdict(list)
    for number, (place, value) in enumerate(_objects(rows)):
        row = rows.one(_Nlvr, value, place)
        if row is None:
            continue
        stem = row.identifier.rpartition("-")[0]
        images = row.images or (f"{stem}-img0.png", f"{stem}-img1.png")
        pairs[images].append(Asked(row.identifier or str(number), row.sentence, (row.label,) if row.label else ()))
    for (first, second), stated in pairs.items():
        yield split, Item(first, stated[0].id, questions=tuple(stated), second=second)


def _objects(rows: Rows) -> Iterator[tuple[str, Any]]:
    """(place, value) of JSON lines, or of the items of a JSON list."""
    lines = rows.lines()
    place, line = next(lines, ("", ""))
    if line.lstrip().startswith("["):
        yield from ((rows.place(f"row {i}"), value) for i, value in enumerate(rows.listed()))
        return
    while line:
        try:
            yield place, parse_json(line)
        except ValueError:
            rows.left.count("is not JSON", place)
        place, line = next(lines, ("", ""))
