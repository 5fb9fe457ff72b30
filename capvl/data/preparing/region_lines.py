"""JSON lines of regions, and prepared data sets: X-VLM's own lines, ODVG in and out, scenes.

Adapters as in `detections`.
"""

import json
import pathlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated as Of
from typing import Any

import pydantic

from capvl.data.preparing.detections import Classes, Found, Four, Pixels, corners, enter
from capvl.data.preparing.leaks import coco_id_of
from capvl.data.preparing.regional import Annotated, Entity, Phrase, places
from capvl.data.reading import sources
from capvl.data.reading.classes import Category, categories
from capvl.data.reading.regions import DETECTION, FEATURES, Region, crowds, kinds, looked_for, regions
from capvl.data.reading.rejected import Rejected
from capvl.data.reading.rows import Caption, FormatError, Name, Number, Row, Rows, Text, Texts
from capvl.data.reading.sources import as_text
from capvl.data.scenes import world
from capvl.errors import UserError
from capvl.lines import parse_json, read_json


def _values(rows: Rows, kind: type[Row]) -> Iterator[tuple[str, Any]]:
    """(place, row) of JSON lines that are as they should be."""
    found = False
    for place, line in rows.lines():
        try:
            value = parse_json(line)
        except ValueError:
            rows.left.count("is not JSON", place)
            continue
        if (row := rows.one(kind, value, place)) is not None:
            found = True
            yield place, row
    if not found:
        why = "; ".join(f"{first[0]} {reason}" for reason, (_, first) in rows.left.items()) or "it is empty"
        raise FormatError(f"{rows.path!r} has no line of it: {why}")


class _Elem(Row):
    caption: Texts
    attributes: Texts = []
    bb: Four


class _XvlmLine(Row):
    image_rpath: Text | None = None
    binary: Text | None = None
    caption: Texts = []
    elems: list[Any]

    @pydantic.model_validator(mode="after")
    def _named(self):
        if not (self.image_rpath or self.binary):
            raise ValueError("image_rpath or binary is missing")
        return self


def xvlm(split: str, left: Rejected, classes: Classes, *paths: str) -> Found:
    """X-VLM's lines: {"elems": [{"caption", "attributes", "bb": [x, y, width, height]}], "caption", and "image_rpath"
    or "binary", the image in base64}."""
    for path in paths:
        rows = Rows(path, left)
        for place, row in _values(rows, _XvlmLine):
            entities = []
            for number, value in enumerate(row.elems):
                own = f"{place}, elem {number}"
                if (elem := rows.one(_Elem, value, own)) is None:
                    continue
                phrases = tuple(map(Phrase, rows.texts(elem.caption, own, "phrase")))
                if phrases:
                    attributes = rows.texts(elem.attributes, own, "attribute")
                    entities.append(Entity((corners(elem.bb),), phrases, attributes=attributes))
            name = row.image_rpath or ""
            stem = pathlib.PurePosixPath(name).stem or place
            said = rows.texts(row.caption, place)
            coco = coco_id_of(name)
            yield split, Annotated(name, stem, coco, None, said, tuple(entities), False, "" if name else row.binary)


class _OdvgInstance(Row):
    bbox: Four
    category: Name
    label: Of[int, pydantic.Field(strict=True, ge=0)]


class _OdvgRegion(Row):
    bbox: Any
    phrase: Texts
    tokens_positive: list[Any] | None = None
    score: Of[Number, pydantic.Field(ge=0, le=1)] | None = None


class _Detection(Row):
    instances: list[Any]


class _Grounding(Row):
    caption: Caption
    regions: list[Any]


class _OdvgLine(Row):
    filename: Text
    height: Pixels
    width: Pixels
    detection: _Detection | None = None
    grounding: _Grounding | None = None

    @pydantic.model_validator(mode="after")
    def _either(self):
        if (self.detection is None) == (self.grounding is None):
            raise ValueError("should have either detection or grounding")
        return self


def odvg(split: str, left: Rejected, classes: Classes, path: str, label_map: str = "") -> Found:
    """ODVG, as Grounding DINO and MMDetection read it: a line an image (or a caption of it), boxes (x0, y0, x1, y1) in
    pixels. Of a phrase that its caption has several times nothing says which place is meant, unless tokens_positive
    does: it has none then."""
    rows, images, numbers = Rows(path, left), {}, {}
    if label_map:
        told = read_json(label_map, "Label map")
        if not isinstance(told, dict) or not all(isinstance(v, str) and k.isdigit() for k, v in told.items()):
            raise FormatError(f"{label_map!r} should be an object of numbers and names of classes")
        numbers = {int(label): name for label, name in told.items()}
    for place, row in _values(rows, _OdvgLine):
        item = Annotated(
            row.filename,
            pathlib.PurePosixPath(row.filename).stem,
            coco_id_of(row.filename),
            (row.height, row.width),
        )
        item = images.setdefault(row.filename, item)
        if item.size != (row.height, row.width):
            left.count("image has several sizes", place)
            continue
        if row.detection is not None:
            told = row.detection.instances
            own, texts = tuple(_instances(rows, told, place, numbers, bool(label_map))), item.text
            item = item._replace(searched=len(own) == len(told))
        else:
            texts = item.text if row.grounding.caption in item.text else (*item.text, row.grounding.caption)
            number = texts.index(row.grounding.caption)
            own = tuple(_grounded(rows, row.grounding, number, place))
        images[row.filename] = item._replace(text=texts, entities=(*item.entities, *own))
    for label, name in sorted(numbers.items()):
        enter(classes, name, id=str(label))
    yield from ((split, item) for item in images.values())


def _instances(rows: Rows, values: list[Any], place: str, numbers: dict[int, str], closed: bool) -> Iterator[Entity]:
    for number, value in enumerate(values):
        own = f"{place}, instance {number}"
        if (row := rows.one(_OdvgInstance, value, own)) is None:
            continue
        if closed and row.label not in numbers:
            rows.left.count("category id unknown", own)
        elif numbers.setdefault(row.label, row.category) != row.category:
            rows.left.count("label with the name of another class", own)
        else:
            yield Entity((row.bbox,), category=row.category)


_BOX = pydantic.TypeAdapter(Four)


def _grounded(rows: Rows, grounding: _Grounding, sentence: int, place: str) -> Iterator[Entity]:
    caption = grounding.caption
    for number, value in enumerate(grounding.regions):
        own = f"{place}, region {number}"
        if (row := rows.one(_OdvgRegion, value, own)) is None:
            continue
        nested = isinstance(row.bbox, list) and row.bbox and isinstance(row.bbox[0], list)
        try:
            boxes = [_BOX.validate_python(box) for box in (row.bbox if nested else [row.bbox])]
        except pydantic.ValidationError:
            rows.left.count("bbox should be four numbers, or a list of such", own)
            continue
        phrases = []
        spans = _told(row.tokens_positive)
        for said in rows.texts(row.phrase, own, "phrase"):
            found = [span for span in spans if caption[span[0] : span[1]] == said] or places(said, caption)
            if not found:
                rows.left.count("phrase not in its caption", own)
            elif len(found) == 1:
                ((start, end),) = found
                phrases.append(Phrase(caption[start:end], sentence, start, end))
            elif spans:
                phrases += [Phrase(said, sentence, *span) for span in found]
            else:
                phrases.append(Phrase(said))
        if boxes and phrases:
            scores = () if row.score is None else (row.score,) * len(boxes)
            yield Entity(tuple(boxes), tuple(phrases), scores=scores)


def _told(value: list[Any] | None) -> list[tuple[int, int]]:
    """Spans of tokens_positive, however deep it lists them."""
    if not isinstance(value, list):
        return []
    if len(value) == 2 and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return [(value[0], value[1])]
    return [span for own in value for span in _told(own)]


def prepared(split: str, left: Rejected, classes: Classes, name: str, data_dir: str) -> Found:
    """A prepared data set with regions, "NAME" or "NAME:SPLIT" (`split` by default): scenes, or tars with boxes."""
    bare, _, own = name.partition(":")
    wanted = ("text?", "image_id?", "key?", "coco_id?", "index?", *FEATURES, *DETECTION)
    source = sources.open_source(bare, own or split, data_dir, features=("image",))
    listed = categories(source)
    things = bare.split("/")[0] == "scenes"
    if things and not listed:
        listed = [Category(name) for name in (*world.SHAPES, "word")]
    for told in listed:
        enter(classes, told.name, **told.told())
    found = False
    for i in range(len(source)):
        record = source.read(i, wanted)
        texts = tuple(as_text(t) for t in record.get("text", ()))
        entities = _scene(record, texts) if things else _entities(record, texts)
        found = found or bool(entities)
        key = as_text(record.get("image_id", "") or record.get("key", "") or record.get("index", i))
        coco = as_text(record.get("coco_id", ""))
        item = Annotated(f"{bare}:{own or split}#{i}", key, coco, None, texts, tuple(entities), True)
        negative, more = looked_for(record) or ((), ())
        # A data set of regions has an image without any only where it was searched.
        told = {"searched": "crowds" in record, "negative": negative, "not_exhaustive": more}
        yield split, item._replace(crowds=tuple(_crowd(region) for region in crowds(record)), **told)
    if not found:
        raise UserError(f"Data set {name!r} has no regions: none of its records has objects or boxes.")


def _scene(record: dict, texts: tuple[str, ...]) -> list[Entity]:
    """Objects of a scene: no two have a colour and shape in common, so a caption's words say which is meant."""
    rows, entities = record["objects"], []
    for number, region in enumerate(regions(record)):
        thing = {k: as_text(rows[k][number]) for k in ("shape", "color", "size", "texture", "word")}
        kind = "word" if thing["word"] else thing["shape"]
        short = f"word {thing['word']}" if thing["word"] else f"{thing['color']} {thing['shape']}"
        phrases = [Phrase(p) for p in region.phrases]
        for i, caption in enumerate(texts):
            spans = places(region.phrases[0], caption) or places(short, caption)
            phrases += [Phrase(caption[s:e], i, s, e) for s, e in spans]
        words = (thing["color"],) if thing["word"] else (thing["size"], thing["texture"], thing["color"])
        attributes = tuple(word for word in words if word != "plain")
        entities.append(Entity((region.box,), tuple(phrases), kind, attributes))
    return entities


def _crowd(region: Region) -> Entity:
    return Entity((region.box,), category=region.category, areas=() if region.area < 0 else (region.area,))


def _entities(record: dict, texts: tuple[str, ...]) -> list[Entity]:
    """Regions by chain."""
    found, chains = regions(record), record.get("boxes", {}).get("chain")
    grouped: dict[str, list[Region]] = defaultdict(list)
    of_kinds = kinds(record)
    for i, region in enumerate(found):
        grouped[as_text(chains[i]) if chains is not None else str(i)].append(region)
    entities = []
    for own in grouped.values():
        first = own[0]
        told = [(span, of_kinds.get((first.chain, span), ())) for span in first.spans]
        phrases = [Phrase(texts[n][s:e], n, s, e, own) for (n, s, e), own in told]
        phrases += [Phrase(p) for p in first.phrases if p not in {q.text for q in phrases}]
        boxes = tuple(region.box for region in own)
        areas = () if all(region.area < 0 for region in own) else tuple(region.area for region in own)
        entities.append(Entity(boxes, tuple(phrases), first.category, first.attributes, areas))
    return entities


def odvg_line(record: dict, text: int | None, names: dict[str, int]) -> str:
    """A record of a region data set as a line of ODVG.

    Args:
      record: with `file_name`, `height`, `width`, `text` and what `regions` reads.
      text: the caption to ground; None for a line of detections.
      names: class -> label.
    """
    height, width = int(record["height"]), int(record["width"])
    line: dict[str, Any] = {"filename": as_text(record["file_name"]), "height": height, "width": width}
    found = regions(record)

    def pixels(region: Region) -> list[float]:
        return [round(v * s, 2) for v, s in zip(region.box, (width, height, width, height), strict=True)]

    if text is None:
        line["detection"] = {
            "instances": [
                {"bbox": pixels(r), "label": names[r.category], "category": r.category}
                for r in found
                if r.category in names
            ]
        }
        return json.dumps(line, ensure_ascii=False)
    caption, grouped = as_text(record["text"][text]), defaultdict(list)
    for region in found:
        for span in region.spans:
            if span[0] == text:
                grouped[span[1:]].append(pixels(region))
    line["grounding"] = {
        "caption": caption,
        "regions": [
            {"bbox": boxes[0] if len(boxes) == 1 else boxes, "phrase": caption[s:e], "tokens_positive": [[s, e]]}
            for (s, e), boxes in sorted(grouped.items())
        ],
    }
    return json.dumps(line, ensure_ascii=False)
