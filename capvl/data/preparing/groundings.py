"""Boxes with phrases, file by file onto `Annotated`: Visual Genome, RefCOCO/+/g, MDETR's files, Flickr30k Entities.

Adapters as in `detections`.
"""

import pathlib
import re
from collections import defaultdict
from typing import Any
from xml.etree import ElementTree

from capvl.data.preparing.detections import (
    Classes,
    Found,
    Four,
    Pixels,
    coco_images,
    corners,
    size_of,
)
from capvl.data.preparing.leaks import coco_id_of, refuse_pickle
from capvl.data.preparing.regional import Annotated, Entity, Phrase
from capvl.data.reading.rejected import Rejected
from capvl.data.reading.rows import Caption, FormatError, Id, Kind, Number, Row, Rows, Split, Text, Texts
from capvl.errors import UserError
from capvl.lines import read_lines, read_text
from capvl.lines import split as split_lines


class _Data(Row):
    image_id: Id
    coco_id: Id | None
    height: Pixels
    width: Pixels


def coco_ids(path: str) -> dict[str, str]:
    """Visual Genome's number -> COCO's, of the images of its image_data.json that are COCO's.

    Raises:
      UserError: it can't be read, or is another file.
    """
    rows = Rows(path, Rejected())
    try:
        found = {row.image_id: row.coco_id for _, row in rows.of(_Data, rows.listed(), "image") if row.coco_id}
    except FormatError as e:
        raise UserError(f"{path!r} is not Visual Genome's image_data.json: {e}.") from e
    if not found:
        raise UserError(f"{path!r} says of no image that it is COCO's.")
    return found


class _Regions(Row):
    id: Id
    regions: list[Any]


class _Region(Row):
    x: Number
    y: Number
    width: Number
    height: Number
    phrase: Text


class _Objects(Row):
    image_id: Id
    objects: list[Any]


class _Attributes(Row):
    image_id: Id
    attributes: list[Any]


class _Object(Row):
    object_id: Id
    x: Number
    y: Number
    w: Number
    h: Number
    names: Texts
    attributes: Texts | None = None


def visual_genome(split: str, left: Rejected, classes: Classes, data: str, *files: str) -> Found:
    """Visual Genome: image_data.json, which says each image's size and its number in COCO, and any of
    region_descriptions.json, objects.json and attributes.json, told apart by their keys."""
    rows = Rows(data, left)
    images = {row.image_id: row for _, row in rows.of(_Data, rows.listed(), "image")}
    objects: dict[str, dict[str, Entity]] = defaultdict(dict)
    regions: dict[str, list[Entity]] = defaultdict(list)
    kinds = {"regions": _Regions, "objects": _Objects, "attributes": _Attributes}
    for path in files:
        rows = Rows(path, left)
        values = rows.listed()
        first = values[0] if values and isinstance(values[0], dict) else {}
        kind = next((k for k in kinds if k in first), None)
        if kind is None:
            raise FormatError(f"{path!r} is a list of rows without regions, objects or attributes")
        for place, image in rows.of(kinds[kind], values, "image"):
            key = image.id if kind == "regions" else image.image_id
            if key not in images:
                left.count("annotation of an unknown image", place)
            elif kind == "regions":
                for _, row in rows.of(_Region, image.regions, f"image {key}, region"):
                    box = corners((row.x, row.y, row.width, row.height))
                    regions[key].append(Entity((box,), (Phrase(row.phrase),)))
            else:
                _objects(rows, getattr(image, kind), key, objects[key])
    if not any(regions.values()) and not any(objects.values()):
        raise FormatError("no annotation is of one of the images of its image_data.json")
    for key, image in images.items():
        entities = (*objects[key].values(), *regions[key])
        yield split, Annotated(f"{key}.jpg", key, image.coco_id or "", (image.height, image.width), (), entities)


def _objects(rows: Rows, values: list[Any], image: str, known: dict[str, Entity]) -> None:
    """Objects, or rows of attributes, which are objects too, by their id."""
    for place, row in rows.of(_Object, values, f"image {image}, object"):
        names, said = rows.texts(row.names, place, "name"), rows.texts(row.attributes or (), place, "attribute")
        entity = known.get(row.object_id)
        if entity is None and names:
            box = corners((row.x, row.y, row.w, row.h))
            entity = Entity((box,), tuple(map(Phrase, names)), names[0])
        if entity is not None:
            attributes = tuple(dict.fromkeys(a.strip().lower() for a in (*entity.attributes, *said)))
            known[row.object_id] = entity._replace(attributes=attributes)


class _Sentence(Row):
    sent: Text | None = None
    raw: Text | None = None


class _Ref(Row):
    ref_id: Id
    ann_id: Id
    image_id: Id
    split: Split
    sentences: list[_Sentence]


class _Ann(Row):
    id: Id
    image_id: Id
    bbox: Four


class _RefInstances(Row):
    images: list[Any]
    annotations: list[Any]


def refcoco(split: str, left: Rejected, classes: Classes, refs: str, instances: str) -> Found:
    """RefCOCO, RefCOCO+ and RefCOCOg: refs as JSON, and instances.json beside it; the refs say their splits."""
    refuse_pickle(refs)
    rows = Rows(instances, left)
    values = rows.json(_RefInstances)
    images = coco_images(rows, values.images, left)
    boxes = {row.id: row for _, row in rows.of(_Ann, values.annotations, "annotation")}
    found: dict[tuple[str, str], list[Entity]] = defaultdict(list)
    rows = Rows(refs, left)
    listed = rows.listed()
    for place, row in rows.of(_Ref, listed, "ref"):
        ann = boxes.get(row.ann_id)
        if ann is None or ann.image_id != row.image_id or row.image_id not in images:
            left.count("ref of an unknown annotation", place)
            continue
        phrases = tuple(Phrase(said) for s in row.sentences if (said := s.sent or s.raw))
        if not phrases:
            left.count("ref without a sentence", place)
            continue
        found[row.split, row.image_id].append(Entity((corners(ann.bbox),), phrases))
    if listed and not found:
        raise FormatError(f"{instances!r} has none of the annotations that {refs!r} names: it is of another split")
    for (own, key), entities in found.items():
        image = images[key]
        yield own, Annotated(image.file_name or key, key, key, size_of(image), (), tuple(entities))


class _Mdetr(Row):
    images: list[Any]
    annotations: list[Any]


class _MdetrImage(Row):
    id: Id
    file_name: Text
    caption: Caption
    height: Pixels | None = None
    width: Pixels | None = None
    dataset_name: Kind = ""


class _MdetrBox(Row):
    image_id: Id
    bbox: Four
    tokens_positive: list[tuple[int, int]]
    iscrowd: bool | int | None = 0


def mdetr(split: str, left: Rejected, classes: Classes, path: str) -> Found:
    """MDETR's files (RefCOCO/+/g, Flickr30k Entities, GoldG): COCO's form, a row a caption, and what of the caption a
    box is. RefCOCO's captions are phrases of their box, and no captions."""
    rows = Rows(path, left)
    values = rows.json(_Mdetr)
    captions = {row.id: row for _, row in rows.of(_MdetrImage, values.images, "image")}
    grouped: dict[str, dict[tuple, list]] = defaultdict(lambda: defaultdict(list))
    for place, row in rows.of(_MdetrBox, values.annotations, "annotation"):
        if row.image_id not in captions:
            left.count("annotation of an unknown image", place)
        elif row.iscrowd:
            left.count("crowd region", place)
        else:
            grouped[row.image_id][tuple(row.tokens_positive)].append(corners(row.bbox))
    images: dict[str, list[_MdetrImage]] = defaultdict(list)
    for row in captions.values():
        images[row.file_name].append(row)
    for name, own in images.items():
        texts, entities = [], []
        for row in own:
            referring = row.dataset_name.startswith("refcoco")
            if not referring:
                texts.append(row.caption)
            for spans, boxes in grouped[row.id].items():
                phrases = tuple(Phrase(row.caption[s:e], len(texts) - 1, s, e) for s, e in spans)
                entities.append(Entity(tuple(boxes), (Phrase(row.caption),) if referring else phrases))
        stem = pathlib.PurePosixPath(name).stem
        # The files of expressions call an image COCO_train2014_000000000042_1.jpg at times.
        yield split, Annotated(name, stem, coco_id_of(name), size_of(own[0]), tuple(texts), tuple(entities))


class _Expression(Row):
    image: Text
    text: Texts
    bbox: Four
    height: Pixels | None = None
    width: Pixels | None = None


def xvlm_refcoco(split: str, left: Rejected, classes: Classes, path: str) -> Found:
    """X-VLM's files of RefCOCO+ for fine-tuning: [{"image", "text", "bbox": [x, y, width, height]}]."""
    rows = Rows(path, left)
    grouped: dict[str, list] = defaultdict(list)
    sizes = {}
    for place, row in rows.of(_Expression, rows.listed()):
        phrases = tuple(map(Phrase, rows.texts(row.text, place, "phrase")))
        sizes.setdefault(row.image, size_of(row))
        if phrases:
            grouped[row.image].append(Entity((corners(row.bbox),), phrases))
    for name, entities in grouped.items():
        stem = pathlib.PurePosixPath(name).stem
        yield split, Annotated(name, stem, coco_id_of(name), sizes[name], (), tuple(entities))


_MARKED = re.compile(r"\[/EN#(\d+)/(\S*) ([^\]]*)\]")


def flickr30k_entities(
    split: str, left: Rejected, classes: Classes, sentences: str, annotations: str, listed: str = ""
) -> Found:
    """Flickr30k Entities: the folders Sentences and Annotations, and a list of the images of a split (train.txt)."""
    said, drawn = (pathlib.Path(folder) for folder in (sentences, annotations))
    for folder in (said, drawn):
        if not folder.is_dir():
            raise UserError(f"Folder {str(folder)!r} does not exist.")
    if listed:
        names = [name.removesuffix(".jpg") for name in read_lines(listed, "images")]
    else:
        names = sorted(file.stem for file in said.glob("*.txt"))
    for name in dict.fromkeys(names):
        if not (said / f"{name}.txt").is_file() or not (drawn / f"{name}.xml").is_file():
            left.count("image in no region file", name)
            continue
        texts, phrases = [], defaultdict(list)
        for line in split_lines(read_text(said / f"{name}.txt", "Sentences")):
            if line.strip():
                text, found = unmarked(line.strip())
                for chain, start, end, kinds in found:
                    phrases[chain].append(Phrase(text[start:end], len(texts), start, end, kinds))
                texts.append(text)
        size, boxes = _entity_boxes(drawn / f"{name}.xml")
        entities = tuple(Entity(tuple(own), tuple(phrases[c])) for c, own in boxes.items() if phrases[c])
        yield split, Annotated(f"{name}.jpg", name, "", size, tuple(texts), entities)


def unmarked(line: str) -> tuple[str, list[tuple[str, int, int, tuple[str, ...]]]]:
    """A sentence without its marks, and (chain, first character, end, kinds) of what was marked; chain "0" is nothing
    seen."""
    text, found, last = "", [], 0
    for mark in _MARKED.finditer(line):
        text += line[last : mark.start()]
        if mark[1] != "0" and mark[3].strip():
            kinds = tuple(filter(None, mark[2].split("/")))
            found.append((mark[1], len(text), len(text) + len(mark[3]), kinds))
        text, last = text + mark[3], mark.end()
    return text + line[last:], found


def read_xml(file: pathlib.Path, what: str) -> ElementTree.Element:
    """The root of an annotation in XML.

    Raises:
      UserError: it can't be read.
      FormatError: it is none of `what`.
    """
    text = read_text(file, "Annotation file")
    try:
        if "<!" in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL):  # Entities of XML can grow without end.
            raise ValueError("a declaration")
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as e:
        raise FormatError(f"{str(file)!r} is no annotation of {what}") from e


def _entity_boxes(file: pathlib.Path) -> tuple[tuple[int, int] | None, dict[str, list]]:
    """((height, width), chain -> boxes); pixels count from 1 in these files."""
    root = read_xml(file, "Flickr30k Entities")
    try:
        size = tuple(int(root.find("size").find(name).text) for name in ("height", "width"))
        boxes = defaultdict(list)
        for thing in root.iter("object"):
            if (box := thing.find("bndbox")) is not None:
                sides = tuple(float(box.find(side).text) - 1 for side in ("xmin", "ymin", "xmax", "ymax"))
                for chain in thing.findall("name"):
                    boxes[chain.text].append(sides)
    except (AttributeError, TypeError, ValueError) as e:
        raise FormatError(f"{str(file)!r} is no annotation of Flickr30k Entities") from e
    return size if min(size) > 0 else None, boxes
