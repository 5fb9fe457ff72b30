"""What a sample of a shard says beside its image: captions, label, boxes and phrases, validated by one schema.

Preparing and streaming read samples by it alike, whatever files they come from. A sample that does not fit is left out
whole, with the reason: no part of it is guessed.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    StrictStr,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import from_json

from capvl.data.reading.rejected import RejectedError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
TEXT_NAMES = ("caption", "txt", "text", "alt_text")
"""Of members and of keys of the JSON; `captions` of the JSON comes before them."""

_LANGUAGE = re.compile(r"[a-z]{2}([-_]\w+)?", re.IGNORECASE)


def _whole(value: Any) -> Any:
    """Data frames make 5.0 of 5 where a column has gaps."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _texts(value: Any) -> list[str]:
    """One text, a list of texts, or either by language; null and blanks become "", so that places stay."""
    if isinstance(value, dict) and value and all(_LANGUAGE.fullmatch(key) for key in value):
        value = [text for own in value.values() for text in (own if isinstance(own, list) else [own])]
    value = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in value):
        raise ValueError("no texts")
    return [(text or "").strip() for text in value]


def _corners(box: tuple[float, ...]) -> tuple[float, ...]:
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        raise ValueError("no area")
    return box


def _rows(value: Any) -> Any:
    """(chain, box) of a list of boxes, or of lists of them by chain."""
    if isinstance(value, dict):
        if not all(isinstance(boxes, list) for boxes in value.values()):
            raise ValueError("no lists")
        return [(chain, box) for chain, boxes in value.items() for box in boxes]
    if not isinstance(value, list):
        raise ValueError("no list")
    return [(str(i), box) for i, box in enumerate(value)]


def _chain(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Texts = Annotated[list[str], PlainValidator(_texts)]
Label = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=-1, lt=2**63)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Box = Annotated[tuple[Finite, Finite, Finite, Finite], AfterValidator(_corners)]
Place = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
# Sentence, first word, number of words, chain, types of the entity, words.
Phrase = tuple[Place, Place, Place, Annotated[StrictStr, BeforeValidator(_chain)], Any, StrictStr]


class Schema(BaseModel):
    """Keys of a sample's JSON that mean something here; null is as if the key were not there.

    Attributes:
      captions: a text, a list of texts, or either by language ({"en": …}: all of them are captions); blanks are left
        out.
      label: a whole number of 64 bits; -1 for none.
      class_name: a text.
      boxes: a list of (x0, y0, x1, y1) in pixels of the upright image, or a dict chain -> such a list.
      labels, category_names: of a list of boxes, one of each.
      phrases: rows (sentence, first word, number of words, chain, types, words).
    """

    captions: Texts = []
    label: Label = -1
    class_name: StrictStr = ""
    boxes: Annotated[list[tuple[str, Box]], BeforeValidator(_rows)] = []
    labels: list[Label | None] = []
    category_names: list[StrictStr | None] = []
    phrases: list[Phrase] = []


REASONS = {
    "captions": "captions are no texts",
    "label": "label is no whole number",
    "class_name": "class_name is no text",
    "boxes": "boxes are not x0 < x1, y0 < y1",
    "labels": "labels don't fit the boxes",
    "category_names": "category_names don't fit the boxes",
    "phrases": "phrases are not rows of six",
}
_CAPTIONS = TypeAdapter(Texts)
_NOTHING = Schema()


@dataclasses.dataclass(frozen=True)
class Record:
    """What a sample says; `schema` is its valid JSON, `meta` the whole of it.

    Attributes:
      captions: without blanks.
      schema: see `Schema`.
      meta: the JSON as it stands.
    """

    captions: list[str]
    schema: Schema
    meta: dict[str, Any]


def read(members: dict[str, bytes], text: str = "") -> Record:
    """What a sample says.

    Args:
      members: suffix -> bytes; `cls` is a label, as WebDataset's examples have it.
      text: the member, else the key of the JSON, that holds the captions; "" for `captions` of the JSON, else the first
        of TEXT_NAMES that says anything, members before keys.

    Raises:
      RejectedError: with the reason.
    """
    meta = _json(members.get("json", b""))
    schema = _validated(_class(members) | meta)
    captions = _named(members, meta, text) if text else schema.captions
    if not text and not any(captions):
        found = (texts for name in _places(members, meta) if any(texts := _named(members, meta, name)))
        captions = next(found, [])
    kept = [caption for caption in captions if caption]
    # Phrases count sentences: leaving one out would move the others.
    if schema.phrases and (len(kept) != len(captions) or max(row[0] for row in schema.phrases) >= len(kept)):
        raise RejectedError("phrases don't fit the captions")
    return Record(kept, schema, meta)


def boxes(schema: Schema, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Rows of the feature `boxes` as prepared records have it, `bbox` as (y0, x0, y1, x1) in fractions, cut at the
    image's edges.

    Args:
      schema: of the sample.
      size: (height, width) of the upright image.

    Raises:
      RejectedError: one lies outside.
    """
    labels, names = (rows or [None] * len(schema.boxes) for rows in (schema.labels, schema.category_names))
    (height, width), found = size, []
    for (chain, (x0, y0, x1, y1)), label, name in zip(schema.boxes, labels, names, strict=True):
        top, left, bottom, right = (min(max(v, 0.0), 1.0) for v in (y0 / height, x0 / width, y1 / height, x1 / width))
        if top >= bottom or left >= right:
            raise RejectedError("box outside of the image")
        own = {"chain": chain, "label": -1 if label is None else label, "category": name or ""}
        found.append({"bbox": (top, left, bottom, right)} | own)
    return found


def phrases(schema: Schema) -> list[dict[str, Any]]:
    """Rows of the feature `phrases`."""
    return [dict(sentence=s, first_word=f, num_words=n, chain=c, phrase=p) for s, f, n, c, _, p in schema.phrases]


def image(members: dict[str, bytes], name: str = "") -> bytes:
    """The encoded image of a sample.

    Args:
      members: suffix -> bytes.
      name: its suffix; "" for the one of IMAGE_SUFFIXES that is there.

    Raises:
      RejectedError: there is none, or more than one.
    """
    found = [suffix for suffix in ((name.lower(),) if name else IMAGE_SUFFIXES) if suffix in members]
    if not found:
        raise RejectedError("no image")
    if len(found) > 1:
        raise RejectedError("several images")
    return members[found[0]]


def _json(data: bytes) -> dict[str, Any]:
    if not data:
        return {}
    try:
        # Unlike Python's, this reader neither recurses without end nor lets half characters through.
        meta = from_json(data.decode(json.detect_encoding(data)))
    except ValueError as e:
        raise RejectedError("unreadable JSON") from e
    if not isinstance(meta, dict):
        raise RejectedError("unreadable JSON")
    return meta


def _class(members: dict[str, bytes]) -> dict[str, Any]:
    """The label in WebDataset's member `cls`, for who has none in the JSON."""
    said = members.get("cls", b"").strip()
    return {"label": int(said) if re.fullmatch(rb"\d{1,20}", said) else said} if said else {}


def _validated(meta: dict[str, Any]) -> Schema:
    given = {name: meta[name] for name in REASONS if meta.get(name) is not None}
    boxes = given.get("boxes")
    if not (boxes and isinstance(boxes, list)):
        given.pop("labels", None)
        given.pop("category_names", None)
    if not given:
        return _NOTHING
    try:
        schema = Schema(**given)
    except ValidationError as e:
        raise RejectedError(REASONS[e.errors(include_url=False)[0]["loc"][0]]) from e
    for name in ("labels", "category_names"):
        rows: Sequence = getattr(schema, name)
        if rows and len(rows) != len(schema.boxes):
            raise RejectedError(REASONS[name])
    return schema


def _places(members: dict[str, bytes], meta: dict[str, Any]):
    """Where captions may stand, whatever the case of the keys' letters."""
    yield from (name for name in TEXT_NAMES if name in members)
    lowered = {key.lower(): key for key in meta}
    yield from (lowered[name] for name in ("captions", *TEXT_NAMES) if name in lowered)


def _named(members: dict[str, bytes], meta: dict[str, Any], name: str) -> list[str]:
    if name in members:
        try:
            return [members[name].decode("utf-8-sig").strip()]
        except UnicodeDecodeError as e:
            raise RejectedError("text is not UTF-8") from e
    if meta.get(name) is None:
        return []
    try:
        return _CAPTIONS.validate_python(meta[name])
    except ValidationError as e:
        raise RejectedError(REASONS["captions"]) from e
