"""Images of evaluations that must not be trained on: told by their numbers in COCO, or by their files' names.

The validation and test images of RefCOCO/+/g are among COCO's training images, and Visual Genome has images of every
split of COCO. So a training split is only made of images that may be evaluated on elsewhere when it is said which
evaluations are meant, or that none is.
"""

import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from capvl import storage
from capvl.data.preparing.regional import Annotated
from capvl.errors import UserError
from capvl.lines import parse_json, read_text, split

IMAGES = "images.json"
"""Beside a region data set: what its images are called."""
PREPARED, OWN = "prepared", "own"
EVALUATIONS = "RefCOCO/+/g, COCO's and Flickr30k's tests"

_COCO = re.compile(r"COCO_[A-Za-z]+\d{4}_(\d{12})(?:_\d+)?|(\d{12})", re.ASCII)
_NUMBER = re.compile(r"0|[1-9]\d{0,11}", re.ASCII)


class Evaluation(NamedTuple):
    """Images that something is evaluated on.

    Attributes:
      name: for the report.
      coco: their numbers in COCO.
      files: names of their files, without folders and suffix.
    """

    name: str
    coco: frozenset[str]
    files: frozenset[str]

    def has(self, item: Annotated, folder: str = "") -> bool:
        """Whether an image, whose name is a path in `folder`, is one of these."""
        return bool(item.coco_id and item.coco_id in self.coco) or bool(
            item.image and (stem(item.image) in self.files or os.path.join(folder, item.image) in self.files)
        )


def stem(name: str) -> str:
    """A file's name without folders and suffix."""
    return pathlib.PurePosixPath(name.replace("\\", "/")).stem


def coco_id_of(name: str) -> str:
    """The number in COCO of an image whose file is called as COCO's are; "" for others."""
    match = _COCO.fullmatch(stem(name))
    return str(int(match[1] or match[2])) if match else ""


def refuse_pickle(path: str) -> None:
    """Raises UserError where a file is a pickle: reading one runs whatever code it holds."""
    try:
        with open(path, "rb") as file:
            first = file.read(2)
    except OSError:
        first = b""  # Who reads it says so.
    if path.endswith((".p", ".pkl", ".pickle")) or (first[:1] == b"\x80" and first[1:2] in b"\2\3\4\5"):
        target = re.sub(r"\.(p|pkl|pickle)$", "", path) + ".json"
        raise UserError(
            f"{path!r} is a pickle, which can run code when it is read; where you trust it, write it as JSON with "
            f"`python -c \"import json, pickle; json.dump(pickle.load(open({path!r}, 'rb')), open({target!r}, 'w'))\"`."
        )


def read(path: str) -> Evaluation:
    """The images that a file names: of those that say their splits all but training's, else all.

    Args:
      path: refs of RefCOCO as JSON, Karpathy's dataset_*.json, a file of COCO's form (MDETR's too), X-VLM's list of
        expressions, or a text file with a file's name, or a number, a line. A number stands for COCO's image and for
        the file of that name.

    Raises:
      UserError: a pickle, unreadable, of another form, or without an image.
    """
    refuse_pickle(path)
    text = read_text(path, "List of evaluation images")
    coco: set[str] = set()
    files: set[str] = set()
    if text.lstrip()[:1] in ("{", "["):
        try:
            value = parse_json(text)
        except ValueError as e:
            raise UserError(f"The list of evaluation images {path!r} is not JSON: {e}.") from e
        for number, name in _named(value, path):
            coco |= {number} if number else set()
            files |= {stem(name)} if name else set()
    else:
        for line in filter(None, map(str.strip, split(text))):
            coco |= {line} if _NUMBER.fullmatch(line) else {found} if (found := coco_id_of(line)) else set()
            files.add(stem(line))
    if not coco and not files:
        raise UserError(f"{path!r} names no image that is evaluated on.")
    return Evaluation(pathlib.PurePath(path).name, frozenset(coco), frozenset(files))


def _named(value: Any, path: str) -> Iterable[tuple[str, str]]:
    """(number in COCO, file's name) of the images of a JSON file; "" for what isn't known."""
    rows = value.get("images") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{path!r} should be refs, a file of COCO's or of Karpathy's form, or lines with an image each."
        )
    for i, row in enumerate(rows):
        name = next((row[k] for k in ("file_name", "filename", "image") if isinstance(row.get(k), str)), "")
        number = row.get("cocoid", row.get("image_id") if "ref_id" in row and "image" not in row else None)
        number = str(number) if isinstance(number, int) and not isinstance(number, bool) else coco_id_of(name)
        if not number and not name:
            raise UserError(f"{path!r} names no image in its row {i}.")
        if row.get("split") not in ("train", "restval"):
            yield number, "" if "ref_id" in row and "image" not in row else name


def evaluations(exclude: Sequence[str], data_dir: str, allow_leaks: bool, needed: bool) -> list[Evaluation]:
    """What must not be trained on.

    Args:
      exclude: files (`read`), "prepared" for the other splits of region data sets in `data_dir`, "own" for those of
        the data set that is being made; the latter two are always included.
      data_dir: where prepared data sets are.
      allow_leaks: nothing is excluded.
      needed: whether there is a training split of images that others evaluate on.

    Raises:
      UserError: it is needed and nothing was said; or see `read`.
    """
    if allow_leaks:
        if exclude:
            raise UserError("--allow_leaks and --exclude contradict each other; give one of them.")
        return []
    if needed and not exclude:
        raise UserError(
            f"Its training images may be among those that {EVALUATIONS} are evaluated on; name these with "
            f"--exclude=FILES (refs as JSON, dataset_coco.json, lists of names; {PREPARED!r} for the data sets of "
            f"--data_dir, {OWN!r} for this one's other splits), or say --allow_leaks; images of your own "
            "in COCO's form have --format=coco_style."
        )
    return [*(read(path) for path in exclude if path not in (PREPARED, OWN)), *prepared(data_dir)]


def prepared(data_dir: str) -> list[Evaluation]:
    """The images of every split but training's of region data sets in a folder."""
    return [
        Evaluation(f"{name}:{own}", frozenset(images["coco"]), frozenset(images["files"]))
        for name, splits in _listed(data_dir).items()
        for own, images in splits.items()
        if own != "train"
    ]


def trained_on(data_dir: str, items: Iterable[Annotated]) -> dict[str, int]:
    """Prepared data set -> how many of some images are in its training split."""
    numbers = {item.coco_id for item in items} - {""}
    found = {
        name: len(numbers & set(splits["train"]["coco"]))
        for name, splits in _listed(data_dir).items()
        if "train" in splits
    }
    return {name: count for name, count in found.items() if count}


def _listed(data_dir: str) -> dict[str, dict[str, dict[str, list[str]]]]:
    return {
        file.parent.parent.name: storage.read_json(file)
        for file in sorted(storage.folder(data_dir).glob(f"*/*/{IMAGES}"))
    }


def of_items(name: str, items: Iterable[Annotated], folder: str | None = None) -> Evaluation:
    """The images of a split as an evaluation. They go by their names without folders and suffix; where these are paths
    in a `folder`, by the whole path: frames of two films may have the same names."""
    items = list(items)
    coco = frozenset(item.coco_id for item in items) - {""}
    # A number of its own says nothing about other sets' files; COCO's are told by their numbers.
    names = frozenset(item.image for item in items if item.image and not item.coco_id)
    whole = [stem(name) if folder is None else os.path.join(folder, name) for name in names]
    return Evaluation(name, coco, frozenset(whole))


def listing(splits: dict[str, list[Annotated]], folder: str | None = None) -> dict[str, dict[str, list[str]]]:
    """IMAGES of a data set: numbers in COCO of each split, and names of the files of those without one that are
    evaluated on; `folder` as for `of_items`."""
    found = {}
    for own, items in splits.items():
        known = of_items(own, items, folder)
        found[own] = {"coco": sorted(known.coco), "files": sorted(known.files) if own != "train" else []}
    return found
