"""What annotations of regions are read: the index of formats, and each split's images with what is said of them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from capvl.data.preparing import detections, folders, grit, groundings, region_lines, regional
from capvl.data.preparing.detections import Classes
from capvl.data.preparing.regional import Annotated
from capvl.data.reading.rejected import Rejected
from capvl.data.reading.rows import FormatError
from capvl.errors import UserError

SHOWN = 200
"""Characters of a name in the report."""


class Format(NamedTuple):
    """How annotations are read.

    Attributes:
      adapter: (split, what is left out, classes, files …) -> (split, Annotated).
      files: their names; "?" may be left out, "+" stands for one or more, "*" for any number.
      boxes: how the format gives them, for people.
      leaks: whether its images may be among those that others evaluate on.
      paths: whether it names images by whole paths: two files of one name are two images then.
    """

    adapter: Any
    files: tuple[str, ...]
    boxes: str
    leaks: bool = True
    paths: bool = False


FORMATS = {
    "coco": Format(detections.coco, ("instances.json", "captions.json?"), "x, y, width, height in pixels"),
    "lvis": Format(detections.lvis, ("instances.json",), "x, y, width, height in pixels"),
    "objects365": Format(detections.objects365, ("instances.json",), "x, y, width, height in pixels", leaks=False),
    "coco_style": Format(
        detections.objects365, ("instances.json",), "x, y, width, height in pixels", leaks=False, paths=True
    ),
    "v3det": Format(detections.objects365, ("instances.json",), "x, y, width, height in pixels", leaks=False),
    "openimages": Format(
        detections.openimages,
        ("class-descriptions.csv", "boxes.csv or labels.csv+"),
        "XMin, XMax, YMin, YMax in fractions",
        False,
    ),
    "visual_genome": Format(
        groundings.visual_genome,
        ("image_data.json", "region_descriptions.json or objects.json or attributes.json+"),
        "x, y, width, height in pixels",
    ),
    "refcoco": Format(groundings.refcoco, ("refs.json", "instances.json"), "x, y, width, height in pixels"),
    "mdetr": Format(groundings.mdetr, ("annotations.json",), "x, y, width, height in pixels"),
    "xvlm_refcoco": Format(groundings.xvlm_refcoco, ("expressions.json",), "x, y, width, height in pixels"),
    "flickr30k_entities": Format(
        groundings.flickr30k_entities, ("Sentences", "Annotations", "list.txt?"), "x0, y0, x1, y1 in pixels from 1 on"
    ),
    "odvg": Format(region_lines.odvg, ("lines.jsonl", "label_map.json?"), "x0, y0, x1, y1 in pixels"),
    "xvlm": Format(region_lines.xvlm, ("lines.jsonl+",), "x, y, width, height in pixels"),
    "odinw": Format(folders.odinw, ("FOLDER",), "x, y, width, height in pixels", leaks=False, paths=True),
    "yolo": Format(folders.yolo, ("data.yaml",), "class, centre, width, height in fractions", leaks=False, paths=True),
    "voc": Format(
        folders.voc, ("FOLDER", "list.txt?"), "xmin, ymin, xmax, ymax in pixels from 1 on", leaks=False, paths=True
    ),
    "grit": Format(grit.grit, ("FILE.tar or FILE.parquet+",), "x0, y0, x1, y1 in fractions", leaks=False),
    "prepared": Format(region_lines.prepared, ("NAME or NAME:SPLIT",), "as prepared"),
}


def read(
    format: str, splits: dict[str, list[str]], data_dir: str = ""
) -> tuple[dict[str, list[Annotated]], dict[str, Rejected], Classes]:
    """(split -> its images, split -> what was left out, a closed list of classes: name -> what is said of it).

    Raises:
      UserError: files are missing, unreadable, not of this format, or have nothing that can be used.
    """
    form = FORMATS[format]
    items: dict[str, list[Annotated]] = {}
    left: dict[str, Rejected] = {}
    classes: Classes = {}
    for split, paths in splits.items():
        least = sum(not f.endswith("?") for f in form.files)
        if len(paths) < least or (len(paths) > len(form.files) and not form.files[-1].endswith("+")):
            raise UserError(f"The format {format!r} has the files {','.join(form.files)}, not {','.join(paths)}.")
        rejected = left.setdefault(split, Rejected())
        try:
            found = list(form.adapter(split, rejected, classes, *paths, *((data_dir,) * (format == "prepared"))))
        except FormatError as e:
            raise UserError(f"{', '.join(paths)} is not of the format {format!r}: {e}.") from e
        if not found:
            why = "; ".join(f"{first[0]}: {reason} ({n} x)" for reason, (n, first) in rejected.items()) or "no images"
            raise UserError(f"{', '.join(paths)} has nothing of the format {format!r} to use: {why}.")
        for own, item in found:
            items.setdefault(own, []).append(item)
    if "all" in items:
        raise UserError(
            f"{', '.join(splits['all'])} does not say which split is whose; use --train=…, --val=…, --test=…."
        )
    for own, rows in items.items():
        items[own] = _merged(rows, left.setdefault(own, Rejected()))
    return items, left, classes


def _merged(rows: list[Annotated], left: Rejected) -> list[Annotated]:
    """Each image once: what several rows say of it is put together."""
    found: dict[Any, Annotated] = {}
    for number, row in enumerate(rows):
        key = row.image or (number, row.id)
        first = found.get(key)
        if first is None:
            found[key] = row
        elif first.size != row.size or first.fractions != row.fractions:
            left.count("image has several sizes", row.image[:SHOWN])
        else:
            moved = [_moved(entity, len(first.text)) for entity in row.entities]
            both = {name: (*getattr(first, name), *getattr(row, name)) for name in ("text", "crowds")}
            lists = {name: _once(getattr(first, name), getattr(row, name)) for name in regional.LISTS}
            both |= {"entities": (*first.entities, *moved), "searched": first.searched or row.searched} | lists
            found[key] = first._replace(**both)
    return list(found.values())


def _once(*lists: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for own in lists for name in own))


def _moved(entity: regional.Entity, count: int) -> regional.Entity:
    phrases = tuple(p._replace(sentence=p.sentence + count) if p.sentence >= 0 else p for p in entity.phrases)
    return entity._replace(phrases=phrases)
