"""Annotations in folders beside their images: YOLO's, Pascal VOC's, and a file of COCO's form a split (ODinW).

Adapters as in `detections`; images are named by their paths. `all` takes the splits that a folder has.
"""

import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import yaml

from capvl.data.preparing.detections import Classes, Found, corners, enter, of_form
from capvl.data.preparing.groundings import read_xml
from capvl.data.preparing.leaks import coco_id_of
from capvl.data.preparing.regional import Annotated, Corners, Entity
from capvl.data.reading.lookup import SUFFIXES, files
from capvl.data.reading.rejected import Rejected
from capvl.data.reading.rows import FormatError
from capvl.errors import UserError
from capvl.lines import read_text
from capvl.lines import split as split_lines

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""What splits are called in folders and files."""
PIXELS = 2.0
"""Sides above this are no fractions."""


def _folder(path: str) -> pathlib.Path:
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise UserError(f"Folder {path!r} does not exist.")
    return folder


def _asked(split: str) -> dict[str, tuple[str, ...]]:
    """The splits that are asked for, with what they may be called."""
    return SPLITS if split == "all" else {split: SPLITS[split]}


def odinw(split: str, left: Rejected, classes: Classes, path: str) -> Found:
    """A folder as Roboflow exports it and ODinW has it: train, valid and test, each with its images and a file of
    COCO's form beside them; or one folder with a file a split. Of two such files that is read which has no class for
    the background, as GLIP does."""
    folder, found = _folder(path), False
    for own, names in _asked(split).items():
        places = [
            (folder / sub / file, folder / sub)
            for sub in names
            for file in ("annotations_without_background.json", "_annotations.coco.json")
        ]
        places += [(folder / f"{name}_annotations_without_background.json", folder) for name in names]
        file, images = next(((f, images) for f, images in places if f.is_file()), (None, folder))
        if file is not None:
            found = True
            yield from of_form(own, left, classes, str(file), folder=f"{images}/")
    if not found:
        wanted = " or ".join(name for names in _asked(split).values() for name in names)
        files_of = "_annotations.coco.json or annotations_without_background.json"
        raise UserError(f"Folder {path!r} has no {wanted} with {files_of} in it.")


def yolo(split: str, left: Rejected, classes: Classes, path: str) -> Found:
    """YOLO: data.yaml, which names the classes and where each split's images are, and a text file of labels an image:
    class, centre x, centre y, width and height in fractions, or class and a polygon.

    The labels of `…/images/a.jpg` are in `…/labels/a.txt`. An image without that file, or with an empty one, is one
    without anything: so the format has it.
    """
    file = pathlib.Path(path, "data.yaml") if os.path.isdir(path) else pathlib.Path(path)
    try:
        told = yaml.safe_load(read_text(file, "Annotation file"))
    except (yaml.YAMLError, RecursionError) as e:
        raise FormatError(f"{str(file)!r} is not YAML") from e
    if not isinstance(told, dict):
        raise FormatError(f"{str(file)!r} should say names, train and val")
    names = _yolo_names(told)
    for number, name in names.items():
        enter(classes, name, id=str(number))
    if len(set(names.values())) < len(names):
        left.count("category name is there twice", str(file))
    found = False
    for own, keys in _asked(split).items():
        if value := next((told[key] for key in keys if told.get(key)), None):
            found = True
            yield from _yolo_split(own, left, names, file, told, value)
    if not found:
        raise FormatError(f"{str(file)!r} says no {' or '.join(_asked(split))}")


def _yolo_names(told: dict[str, Any]) -> dict[int, str]:
    """Number -> name of the classes, which YAML has as a list or as an object."""
    value = told.get("names")
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        raise FormatError("names should be a list of classes, or an object of numbers and classes")
    names = {}
    for number, name in value.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise FormatError(f"names has {number!r} where a number of a class should be")
        if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
            raise FormatError(f"class {number} is called {name!r}, which should be a text; YAML needs quotes around it")
        names[number] = " ".join(str(name).split())
    if isinstance(told.get("nc"), int) and told["nc"] != len(names):
        raise FormatError(f"nc is {told['nc']}, and there are {len(names)} names")
    return names


def _yolo_split(own: str, left: Rejected, names: dict[int, str], file: pathlib.Path, told: dict, value: Any) -> Found:
    images = [
        image for place in (value if isinstance(value, list) else [value]) for image in _images(file, told, place)
    ]
    if not images:
        raise FormatError(f"{own} of {str(file)!r} has no images in {value!r}")
    labels = [_labels_of(image) for image in images]
    there = [label.is_file() for label in labels]
    if not any(there):
        raise FormatError(f"none of the {len(images)} images of {own} has labels, such as {str(labels[0])!r}")
    points = "kpt_shape" in told
    for image, label, labelled in zip(images, labels, there, strict=True):
        rows = [line for line in split_lines(read_text(label, "Labels")) if line.strip()] if labelled else []
        found = [_yolo_row(line, names, points, f"line {n} of {label.name}", left) for n, line in enumerate(rows, 1)]
        entities = tuple(entity for entity in found if entity is not None)
        item = Annotated(str(image), image.stem, coco_id_of(image.name), None, (), entities, True)
        yield own, item._replace(searched=len(entities) == len(rows))


def _images(file: pathlib.Path, told: dict, place: Any) -> list[pathlib.Path]:
    """The images of one place of data.yaml: a folder of them, or a text file with a path a line."""
    if not isinstance(place, str):
        raise FormatError(f"{str(file)!r} has {place!r} where a folder of images should be")
    base = pathlib.Path(told["path"]) if isinstance(told.get("path"), str) else pathlib.Path()
    # Roboflow writes ../train/images of what lies beside the file.
    bare = pathlib.Path(*(part for part in pathlib.Path(place).parts if part != ".."))
    tries = [file.parent / base / place, file.parent / place, base / place, file.parent / bare]
    found = next((path for path in tries if path.exists()), None)
    if found is None:
        raise UserError(f"{str(file)!r} names the images {place!r}, which are neither there nor at {str(tries[0])!r}.")
    if found.is_dir():
        return files(found, SUFFIXES)
    lines = [line.strip() for line in split_lines(read_text(found, "List of images")) if line.strip()]
    return [found.parent / line.removeprefix("./") for line in lines]


def _labels_of(image: pathlib.Path) -> pathlib.Path:
    parts = list(image.parts[:-1])
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return pathlib.Path(*parts, image.stem + ".txt")


def _yolo_row(line: str, names: dict[int, str], points: bool, place: str, left: Rejected) -> Entity | None:
    """A row as a thing. `points`: keypoints follow the box."""
    try:
        number, *sides = map(float, line.split())
    except ValueError:
        sides = []
    polygon = not points and len(sides) >= 6 and len(sides) % 2 == 0
    if not (len(sides) == 4 or polygon or (points and len(sides) > 4)):
        left.count("row should be a class with four numbers or a polygon", place)
    elif number not in names:
        left.count("category id unknown", place)
    elif not all(map(math.isfinite, sides)):
        left.count("box is not of numbers", place)
    elif max(sides[:4] if points else sides) > PIXELS:
        left.count("box is in pixels, and YOLO has fractions", place)
    else:
        if polygon:
            box = min(sides[::2]), min(sides[1::2]), max(sides[::2]), max(sides[1::2])
        else:
            x, y, width, height = sides[:4]
            box = corners((x - width / 2, y - height / 2, width, height))
        return Entity((box,), category=names[int(number)])
    return None


def voc(split: str, left: Rejected, classes: Classes, path: str, listed: str = "") -> Found:
    """Pascal VOC: Annotations/*.xml, JPEGImages, and lists of splits in ImageSets/Main; or a folder with images and XML
    side by side. Pixels count from 1, and a box's last ones belong to it. What is `difficult` is a crowd: neither
    trained on nor counted. Classes are the names that the folder's files have, in the alphabet's order, as VOC's are.

    Args:
      split, left, classes, path: the folder.
      listed: the list of the split's images, by path or by its name in ImageSets/Main; "" for that of the split's name,
        or for all images where there are no lists.
    """
    folder = _folder(path)
    drawn = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    read = {file.stem: _voc_file(file, left) for file in sorted(drawn.glob("*.xml"))}
    if not read:
        raise FormatError(f"{str(drawn)!r} has no .xml")
    for name in sorted({entity.category for item in read.values() for entity in (*item.entities, *item.crowds)}):
        enter(classes, name)
    images = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else drawn
    for own, keys in _voc_lists(split, folder, listed):
        for key in keys if keys is not None else read:
            if key not in read:
                left.count("image in no region file", key)
                continue
            item = read[key]
            known = (images / f"{key}{suffix}" for suffix in (pathlib.Path(item.image).suffix or ".jpg", *SUFFIXES))
            image = next((file for file in known if file.is_file()), images / f"{key}.jpg")
            yield own, item._replace(image=str(image))


def _voc_lists(split: str, folder: pathlib.Path, listed: str) -> Iterator[tuple[str, list[str] | None]]:
    """(split, names of its images; None for all)."""
    main = folder / "ImageSets" / "Main"
    if listed:
        places = {split: pathlib.Path(listed) if pathlib.Path(listed).is_file() else main / listed}
    elif main.is_dir():
        places = {own: file for own in _asked(split) if (file := main / f"{own}.txt").is_file()}
    elif split == "all":
        # Roboflow's exports, and others, have a folder a split.
        raise UserError(f"Folder {str(folder)!r} has no ImageSets/Main that says which split is whose; use --train=….")
    else:
        yield split, None
        return
    if not places or not all(file.is_file() for file in places.values()):
        known = ", ".join(sorted(file.name for file in main.glob("*.txt")))[:300] or "nothing"
        raise UserError(f"{str(main)!r} has no {listed or split + '.txt'}, but {known}.")
    for own, file in places.items():
        names = [line.split() for line in split_lines(read_text(file, "List of images")) if line.strip()]
        if any(len(name) > 1 for name in names):
            raise UserError(f"{str(file)!r} is a class's list (a name and 1, 0 or -1 a line), and not a split's.")
        yield own, [pathlib.PurePath(name[0]).name.removesuffix(".jpg") for name in names]


def _voc_file(file: pathlib.Path, left: Rejected) -> Annotated:
    root = read_xml(file, "Pascal VOC")
    sides = [root.findtext(f"size/{name}", "") for name in ("height", "width")]
    size = tuple(int(side) for side in sides) if all(side.strip().isdigit() for side in sides) else (0, 0)
    entities, crowds, spoiled = [], [], False
    for number, thing in enumerate(root.findall("object")):
        place, name = f"{file.name}, object {number}", " ".join(thing.findtext("name", "").split())
        box = _voc_box(thing)
        if not name or box is None:
            left.count("object without a name or a bndbox of four numbers", place)
            spoiled = True
            continue
        difficult = thing.findtext("difficult", "0").strip() == "1"
        (crowds if difficult else entities).append(Entity((box,), category=name))
    item = Annotated(root.findtext("filename", "").strip(), file.stem, coco_id_of(file.stem), None, (), tuple(entities))
    return item._replace(size=size if min(size) > 0 else None, crowds=tuple(crowds), searched=not spoiled)


def _voc_box(thing) -> Corners | None:
    """In pixels' edges from 0 on: the pixels from 1 to 3 begin at 0 and end at 3."""
    try:
        x0, y0, x1, y1 = (float(thing.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        return None
    return x0 - 1, y0 - 1, x1, y1
