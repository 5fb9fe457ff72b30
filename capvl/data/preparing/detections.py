"""Boxes with classes, file by file onto `Annotated`: COCO (and LVIS, Objects365), OpenImages.

An adapter gets (split, what is left out, classes) and the files, and yields (split, Annotated); it enters the names of
a closed list of classes into `classes`, in their order.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated as Of
from typing import Any

import pydantic

from capvl.data.preparing.regional import Annotated, Corners, Entity
from capvl.data.reading.rejected import Rejected
from capvl.data.reading.rows import FormatError, Id, Name, Number, Row, Rows, Text
from capvl.errors import UserError

Found = Iterator[tuple[str, Annotated]]
Classes = dict[str, None]


def _four(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise ValueError("should be four numbers")
    return tuple(value)


Four = Of[tuple[Number, Number, Number, Number], pydantic.BeforeValidator(_four)]
"""Four finite numbers."""
Pixels = Of[int, pydantic.Field(strict=True, gt=0)]


def corners(xywh: tuple[float, float, float, float]) -> Corners:
    """(x, y, width, height) -> (x0, y0, x1, y1)."""
    x, y, width, height = xywh
    return x, y, x + width, y + height


class _Instances(Row):
    images: list[Any]
    annotations: list[Any]
    categories: list[Any]


class _Image(Row):
    id: Id
    file_name: Text | None = None
    coco_url: Text | None = None
    height: Pixels | None = None
    width: Pixels | None = None


class _Category(Row):
    id: Id
    name: Name


class _Instance(Row):
    image_id: Id
    category_id: Id
    bbox: Four
    iscrowd: bool | int | None = 0


class _Captions(Row):
    images: list[Any] = []
    annotations: list[Any]


class _Caption(Row):
    image_id: Id
    caption: Text


def coco(split: str, left: Rejected, classes: Classes, instances: str, captions: str = "") -> Found:
    """COCO's and LVIS' instances, whose images are COCO's, and captions of the same images."""
    yield from _coco(split, left, classes, instances, captions, True)


def objects365(split: str, left: Rejected, classes: Classes, instances: str) -> Found:
    """Objects365, and other files of COCO's form whose images are not COCO's."""
    yield from _coco(split, left, classes, instances, "", False)


def _coco(split: str, left: Rejected, classes: Classes, path: str, captions: str, of_coco: bool) -> Found:
    rows = Rows(path, left)
    values = rows.json(_Instances)
    names = {row.id: row.name for _, row in rows.of(_Category, values.categories, "category")}
    classes.update(dict.fromkeys(names.values()))
    images = coco_images(rows, values.images, left)
    entities, texts = defaultdict(list), _coco_captions(captions, images, left)
    known = False
    for place, row in rows.of(_Instance, values.annotations, "annotation"):
        if row.image_id not in images:
            left.count("annotation of an unknown image", place)
            continue
        known = True
        if row.category_id not in names:
            left.count("category id unknown", place)
        elif row.iscrowd:
            left.count("crowd region", place)
        else:
            entities[row.image_id].append(Entity((corners(row.bbox),), category=names[row.category_id]))
    if values.annotations and not known:
        raise FormatError("none of its annotations is of one of its images: they are of another split")
    for key, image in images.items():
        yield (
            split,
            Annotated(
                name_of(image), key, key if of_coco else "", size_of(image), tuple(texts[key]), tuple(entities[key])
            ),
        )


def coco_images(rows: Rows, values: list[Any], left: Rejected) -> dict[str, _Image]:
    """id -> image of a file of COCO's form; each id once."""
    images: dict[str, _Image] = {}
    for place, image in rows.of(_Image, values, "image"):
        if image.id in images:
            left.count("image id is there twice", place)
        else:
            images[image.id] = image
    return images


def name_of(image: _Image) -> str:
    """The name of an image's file."""
    return image.file_name or (image.coco_url or "").rpartition("/")[2] or image.id


def size_of(image) -> tuple[int, int] | None:
    """(height, width), where an image's row says both."""
    return (image.height, image.width) if image.height and image.width else None


def _coco_captions(path: str, images: dict, left: Rejected) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = defaultdict(list)
    if not path:
        return texts
    rows = Rows(path, left)
    for place, row in rows.of(_Caption, rows.json(_Captions).annotations, "annotation"):
        if row.image_id in images:
            texts[row.image_id].append(row.caption)
        else:
            left.count("caption of an unknown image", place)
    if not texts:
        raise FormatError(f"none of the captions of {path!r} is of one of the images: they are of another split")
    return texts


_NUMBERS = ("XMin", "YMin", "XMax", "YMax")


def openimages(split: str, left: Rejected, classes: Classes, descriptions: str, *boxes: str) -> Found:
    """OpenImages: class descriptions ("/m/01g317,Person", with or without a heading) and files of boxes, in fractions.

    Boxes around a group (IsGroupOf) are left out, as crowds are.
    """
    names = {}
    for place, row in _csv(descriptions, left):
        if len(row) != 2 or not all(map(str.strip, row)):
            raise FormatError(f"{place} should be a class's code and its name")
        if row[0] != "LabelName":
            names[row[0].strip()] = row[1].strip()
    classes.update(dict.fromkeys(names.values()))
    entities: dict[str, list[Entity]] = defaultdict(list)
    for path in boxes:
        rows = _csv(path, left)
        _, heading = next(rows, ("", []))
        missing = [name for name in ("ImageID", "LabelName", *_NUMBERS) if name not in heading]
        if missing:
            raise FormatError(f"{path!r} has no column {missing[0]!r}, but {','.join(heading) or 'nothing'}")
        for place, values in rows:
            if len(values) != len(heading):
                left.count("row has more or fewer columns than the heading", place)
                continue
            row = dict(zip(heading, values, strict=True))
            own = entities[row["ImageID"]]  # An image whose boxes are all left out is still one of the set.
            if (entity := _openimages_box(row, names, place, left)) is not None:
                own.append(entity)
    for key, found in entities.items():
        yield split, Annotated(key, key, entities=tuple(found), fractions=True)


def _openimages_box(row: dict[str, str], names: dict[str, str], place: str, left: Rejected) -> Entity | None:
    try:
        box = tuple(float(row[name]) for name in _NUMBERS)
    except ValueError:
        box = (math.nan,)
    if not all(map(math.isfinite, box)):
        left.count("box is not of numbers", place)
    elif max(box) > 2:
        left.count("box is in pixels, and OpenImages has fractions", place)
    elif row["LabelName"] not in names:
        left.count("category id unknown", place)
    elif row.get("IsGroupOf", "0") == "1":
        left.count("crowd region", place)
    else:
        return Entity((box,), category=names[row["LabelName"]])
    return None


def _csv(path: str, left: Rejected) -> Iterator[tuple[str, list[str]]]:
    """(place, columns) of the rows, read as they are needed: there are millions."""
    rows = Rows(path, left)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if row:
                    yield rows.place(f"line {number}"), row
    except OSError as e:
        raise UserError(f"Annotation file {path!r} can't be read: {e.strerror or e}.") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise FormatError(f"{path!r} is no table in UTF-8 with commas") from e
