"""Boxes with classes, file by file onto `Annotated`: COCO's form (COCO, LVIS, Objects365, V3Det), OpenImages.

An adapter gets (split, what is left out, classes) and the files, and yields (split, Annotated); it enters the names of
a closed list of classes into `classes`, in their order (`enter`).
"""

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Annotated as Of
from typing import Any

import pydantic

from capvl.data.preparing.regional import Annotated, Corners, Entity
from capvl.data.reading.rejected import Rejected
from capvl.data.reading.rows import FormatError, Id, Name, Number, Row, Rows, Text
from capvl.errors import UserError

Found = Iterator[tuple[str, Annotated]]
Classes = dict[str, dict[str, Any]]
"""Name -> what is said of a class (`capvl.data.reading.classes.Category`)."""


def enter(classes: Classes, name: str, **told: Any) -> None:
    """One more class of the closed list; one that is there already keeps its place, and what two files tell of it
    differently is told by none."""
    known = classes.setdefault(name, told)
    classes[name] = {key: value for key, value in known.items() if told.get(key) == value}


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
    neg_category_ids: list[Id] | None = None
    not_exhaustive_category_ids: list[Id] | None = None


class _Category(Row):
    id: Id
    name: Name
    supercategory: Any = None
    frequency: Any = None
    definition: Any = pydantic.Field(None, validation_alias=pydantic.AliasChoices("def", "cat_info"))
    synonyms: Any = None


class _Instance(Row):
    image_id: Id
    category_id: Id
    bbox: Four
    iscrowd: bool | int | None = 0
    area: Any = None

    def entity(self, category: str) -> Entity:
        """The annotation as one thing, with its area where it says one."""
        area = self.area
        told = isinstance(area, int | float) and not isinstance(area, bool) and 0 < area < math.inf
        return Entity((corners(self.bbox),), category=category, areas=(float(area),) if told else ())


class _Captions(Row):
    images: list[Any] = []
    annotations: list[Any]


class _Caption(Row):
    image_id: Id
    caption: Text


def coco(split: str, left: Rejected, classes: Classes, instances: str, captions: str = "") -> Found:
    """COCO's instances, whose images are COCO's, and captions of the same images."""
    yield from of_form(split, left, classes, instances, captions, of_coco=True)


def lvis(split: str, left: Rejected, classes: Classes, instances: str) -> Found:
    """LVIS: COCO's images, each searched for some of the classes: those of its boxes, and neg_category_ids, which were
    looked for in vain; of not_exhaustive_category_ids it has more than are annotated."""
    found = False
    for own, item in of_form(split, left, classes, instances, of_coco=True):
        found = found or bool(item.negative)
        yield own, item
    if not found:
        raise FormatError("no image has neg_category_ids, which say what was looked for in it")


def objects365(split: str, left: Rejected, classes: Classes, instances: str) -> Found:
    """Objects365, V3Det, one's own data in COCO's form: images that are not COCO's."""
    yield from of_form(split, left, classes, instances)


def of_form(
    split: str,
    left: Rejected,
    classes: Classes,
    path: str,
    captions: str = "",
    of_coco: bool = False,
    folder: str = "",
) -> Found:
    """A file of COCO's form. Crowds are kept as such, and images without annotations: they were searched, too.

    Args:
      split, left, classes: see the module.
      path: of the file.
      captions: of captions of its images; "" for none.
      of_coco: whether the images are COCO's, and their numbers COCO's numbers.
      folder: that stands before the images' names; "" for none.
    """
    rows = Rows(path, left)
    values = rows.json(_Instances)
    names = _categories(rows, values, classes)
    images = coco_images(rows, values.images, left)
    entities, crowds, texts = defaultdict(list), defaultdict(list), _coco_captions(captions, images, left)
    # An image is one without anything only where nothing that was said of it is left out.
    said = Counter(_key(row.get("image_id")) for row in values.annotations if isinstance(row, dict))
    known = False
    for place, row in rows.of(_Instance, values.annotations, "annotation"):
        if row.image_id not in images:
            left.count("annotation of an unknown image", place)
            continue
        known = True
        if row.category_id not in names:
            left.count("category id unknown", place)
        else:
            own = crowds if row.iscrowd else entities
            own[row.image_id].append(row.entity(names[row.category_id]))
    if values.annotations and not known:
        raise FormatError("none of its annotations is of one of its images: they are of another split")
    for key, image in images.items():
        lists = {
            "negative": _listed(image.neg_category_ids, names, key, left),
            "not_exhaustive": _listed(image.not_exhaustive_category_ids, names, key, left),
        }
        item = Annotated(
            folder + name_of(image),
            key,
            key if of_coco else "",
            size_of(image),
            tuple(texts[key]),
            tuple(entities[key]),
        )
        searched = said[key] == len(entities[key]) + len(crowds[key])
        yield split, item._replace(searched=searched, crowds=tuple(crowds[key]), **lists)


def _key(value: Any) -> str:
    """An id as `rows.Id` reads it."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _categories(rows: Rows, values: _Instances, classes: Classes) -> dict[str, str]:
    """id -> name of the classes, whatever ids they have; each is entered in the order of the file.

    Roboflow's exports have a class in front, of the supercategory "none", which is that of the others and has no boxes:
    the name of the whole set, and no class.
    """
    found: dict[str, _Category] = {}
    for place, row in rows.of(_Category, values.categories, "category"):
        if row.id in found and found[row.id].name != row.name:
            raise FormatError(f"category id {row.id} is there twice, as {found[row.id].name!r} and {row.name!r}")
        if row.id in found:
            rows.left.count("category id is there twice", place)
        else:
            found[row.id] = row
    used = {_key(row.get("category_id")) for row in values.annotations if isinstance(row, dict)}
    over = {row.supercategory for row in found.values() if row.supercategory != "none"}
    names: dict[str, str] = {}
    for key, row in found.items():
        if row.supercategory == "none" and row.name in over and key not in used:
            rows.left.count("category is the name of the whole set", row.name)
            continue
        if row.name in names.values():
            rows.left.count("category name is there twice", row.name)
        names[key] = row.name
        told = {"id": key, "frequency": row.frequency, "definition": row.definition, "synonyms": row.synonyms}
        enter(classes, row.name, **{k: v for k, v in told.items() if v})
    return names


def _listed(ids: list[str] | None, names: dict[str, str], image: str, left: Rejected) -> tuple[str, ...]:
    for key in ids or ():
        if key not in names:
            left.count("category id unknown", f"image {image}")
    return tuple(dict.fromkeys(names[key] for key in ids or () if key in names))


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
    """The name of an image's file; LVIS tells it by coco_url, whose last folder is that of COCO's split."""
    return image.file_name or "/".join((image.coco_url or "").split("/")[-2:]) or image.id


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
    """OpenImages: class descriptions ("/m/01g317,Person", with or without a heading), files of boxes, in fractions, and
    files of labels of images, whose Confidence 0 says that a class was looked for in vain.

    Boxes around a group (IsGroupOf) are crowds.
    """
    names = {}
    for place, row in _csv(descriptions, left):
        if len(row) != 2 or not all(map(str.strip, row)):
            raise FormatError(f"{place} should be a class's code and its name")
        if row[0] != "LabelName":
            names[row[0].strip()] = row[1].strip()
    for code, name in names.items():
        enter(classes, name, id=code)
    entities: dict[str, list[Entity]] = defaultdict(list)
    crowds, negative = defaultdict(list), defaultdict(dict)
    for path in boxes:
        rows = _csv(path, left)
        _, heading = next(rows, ("", []))
        labels = "XMin" not in heading and "Confidence" in heading
        wanted = ("ImageID", "LabelName", *(("Confidence",) if labels else _NUMBERS))
        missing = [name for name in wanted if name not in heading]
        if missing:
            raise FormatError(f"{path!r} has no column {missing[0]!r}, but {','.join(heading) or 'nothing'}")
        for place, values in rows:
            if len(values) != len(heading):
                left.count("row has more or fewer columns than the heading", place)
                continue
            row = dict(zip(heading, values, strict=True))
            if labels and row["LabelName"] not in names:
                left.count("category id unknown", place)
            elif labels and row["Confidence"] == "0":
                negative[row["ImageID"]][names[row["LabelName"]]] = None
            elif not labels:
                own = entities[row["ImageID"]]  # An image whose boxes are all left out is still one of the set.
                if (entity := _openimages_box(row, names, place, left)) is not None:
                    (crowds[row["ImageID"]] if row.get("IsGroupOf", "0") == "1" else own).append(entity)
    for key, found in entities.items():
        item = Annotated(key, key, entities=tuple(found), fractions=True, searched=bool(crowds[key]))
        yield split, item._replace(crowds=tuple(crowds[key]), negative=tuple(negative[key]))


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
