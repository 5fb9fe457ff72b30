"""Images or clips with an annotation file (`.annotations`) -> a tfds data set in ArrayRecord files."""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Sequence

from etils import epath

from capvl import storage
from capvl.data.images import video
from capvl.data.images.decode import BadImageError, decode, image_size
from capvl.data.preparing import annotations, shards
from capvl.data.preparing.annotations import Item
from capvl.data.preparing.publish import VERSION, Shard, check_name, publish
from capvl.data.reading import lookup
from capvl.data.reading.rejected import Rejected
from capvl.data.reading.tsv import Tsv
from capvl.errors import UserError, nearest

EACH = 1000
REGION_SIDES = 2.0
NO_CLASS = -1
NAME_SHOWN = 200
_ROW = re.compile(r"(.*\.tsv)#(\d+)", re.ASCII | re.DOTALL)


def features(frames: int, classes: Sequence[str], pairs: bool = False):
    """The schema: image, frames or `images` of pairs, captions, questions (`answers` is a JSON list), and the class."""
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    text = tfds.features.Text
    image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg" if frames else None)
    asked = {name: text() for name in ("id", "question", "answers", "kind")}
    label = {"label": tfds.features.ClassLabel(names=list(classes))} if classes else {}
    several = "frames" if frames else "images" if pairs else ""
    return tfds.features.FeaturesDict(
        {
            "image_id": text(),
            **({several: tfds.features.Sequence(image)} if several else {"image": image}),
            "text": tfds.features.Sequence(text()),
            "questions": tfds.features.Sequence(asked),
            **label,
        }
    )


def prepare(
    name: str, format: str, splits: dict[str, list[str]], files: str, data_dir: str, frames: int = 0, workers: int = 0
) -> epath.Path:
    """Prepares a data set from annotation files.

    Args:
      name: of the data set to make.
      format: a key of `capvl.data.preparing.annotations.FORMATS`.
      splits: split -> its annotation files; "all" for files that say which split is whose.
      files: folder of the images or videos; "" where the annotations name whole paths.
      data_dir: where prepared data sets are.
      frames: of clips, so many are kept; 0 for images.
      workers: processes; 0 for one a core.

    Returns:
      The data set's folder; it holds `report.json`.

    Raises:
      UserError: bad annotations, none of the images, or a data set of that name.
    """
    check_name(name)
    if format not in annotations.FORMATS:
        raise UserError(f"The format {format!r} is unknown." + nearest(format, annotations.FORMATS))
    if not splits:
        raise UserError("Say which annotation files: --train=…, --val=…, --test=…, or --all=….")
    if frames < 0:
        raise UserError(f"--frames must not be negative, not {frames}.")
    folder = storage.folder(data_dir) / name / VERSION
    if folder.exists():
        raise UserError(f"Data set {name!r} is already prepared in {folder}; remove that folder to make it anew.")
    items, left = _read(format, splits)
    pairs = _are_pairs(items, frames)
    names = dict.fromkeys(name for rows in items.values() for item in rows for name in item.images)
    paths = find_files(names, files, tuple(f".{s}" for s in video.SUFFIXES) if frames else annotations.IMAGE_SUFFIXES)
    classes = sorted({item.class_name for rows in items.values() for item in rows} - {""})
    parts = storage.folder(data_dir) / name / f"incomplete.{os.getpid()}"
    storage.make_folder(parts)
    try:
        made, report = _write(items, paths, parts, frames, classes, workers, pairs)
        for split, rejected in left.items():
            report.setdefault(split, Rejected()).add(rejected)
        for split, rows in made.items():
            if not any(shard.examples for shard in rows):
                rejected = ", ".join(f"{n} x {reason}" for reason, (n, _) in report[split].items()) or "nothing"
                raise UserError(f"Split {split!r} of {name!r} has no example; left out: {rejected}.")
        shown = {
            split: {
                "examples": sum(shard.examples for shard in made.get(split, ())),
                "rejected": {k: {"count": n, "first": first} for k, (n, first) in rejected.items()},
            }
            for split, rejected in report.items()
            if split in made or rejected
        }
        text = f"{format} annotations with their images, prepared by capvl."
        schema = features(frames, classes, pairs)
        publish(folder, name, schema, made, text, {"report.json": json.dumps(shown, indent=1)})
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return folder


def _are_pairs(items: dict[str, list[Item]], frames: int) -> bool:
    """Whether items have two images.

    Raises:
      UserError: only some have, or they should be clips.
    """
    pairs = {bool(item.second) for rows in items.values() for item in rows}
    if len(pairs) > 1:
        raise UserError("Some rows have two images and others one; prepare them as two data sets.")
    if pairs == {True} and frames:
        raise UserError(f"Rows have two images each, and --frames={frames} is of clips.")
    return pairs == {True}


def _write(items, paths: dict[str, tuple[str, str]], parts, frames: int, classes, workers: int, pairs: bool):
    """(split -> shards, split -> what was left out); parts are made in processes."""
    jobs = [
        (split, number, rows[first : first + EACH])
        for split, rows in items.items()
        for number, first in enumerate(range(0, len(rows), EACH))
    ]
    made: dict[str, list[Shard]] = {split: [] for split in items}
    report = {split: Rejected() for split in items}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers or os.cpu_count() or 1, len(jobs) or 1), spawn) as pool:
        calls = []
        for split, number, rows in jobs:
            named = [(item, *_files(item, paths)) for item in rows]
            calls.append(pool.submit(write_part, str(parts / f"{split}-{number:05d}"), named, frames, classes, pairs))
        for (split, number, _), call in zip(jobs, calls, strict=True):
            examples, size, rejected = call.result()
            made[split].append(Shard(parts / f"{split}-{number:05d}", examples, size))
            report[split].add(rejected)
    return made, report


def _files(item: Item, paths: dict[str, tuple[str, str]]) -> tuple[tuple[str, ...], str]:
    """(the files of an item's images, why one lacks)."""
    found = [paths[name] for name in item.images]
    return tuple(path for path, _ in found), next((why for _, why in found if why), "")


def write_part(
    part: str, items: list[tuple[Item, tuple[str, ...], str]], frames: int, classes: Sequence[str], pairs: bool = False
):
    """Writes the records of some items, each with its files and why one lacks ("" where none does).

    Returns:
      (examples, bytes, what was left out).
    """
    # Slow to import.
    from array_record.python.array_record_module import ArrayRecordWriter

    schema, rejected, count, size = features(frames, classes, pairs), Rejected(), 0, 0
    writer = ArrayRecordWriter(part, "group_size:1")
    try:
        for item, files, why in items:
            if why:
                rejected.count(why, item.image[:NAME_SHOWN])
                continue
            try:
                record = schema.serialize_example(schema.encode_example(_example(item, files, frames, classes)))
            except (BadImageError, video.BadVideoError) as e:
                rejected.count(_reason(e), item.image[:NAME_SHOWN])
                continue
            writer.write(record)
            count, size = count + 1, size + len(record)
    finally:
        writer.close()
    return count, size, dict(rejected)


def _reason(error: Exception) -> str:
    if "region" in str(error):
        return "region outside"
    return "too few frames" if "are needed" in str(error) else "undecodable"


def _example(item: Item, files: tuple[str, ...], frames: int, classes: Sequence[str]) -> dict:
    example = {
        "image_id": item.id,
        "text": list(item.text),
        "questions": [q._asdict() | {"answers": json.dumps(q.answers, ensure_ascii=False)} for q in item.questions],
    }
    if classes:
        example["label"] = item.class_name or NO_CLASS
    if frames:
        return example | {"frames": [shards.encode_jpeg(f) for f in video.read_frames(files[0], frames)]}
    if item.second:
        return example | {"images": [_image(path) for path in files]}
    data = _image(files[0])
    return example | {"image": data if item.region is None else around(data, item.region)}


def _image(path: str) -> bytes:
    """The encoded image of a file, or of a row of a TSV.

    Raises:
      BadImageError: it can't be read.
    """
    try:
        data = Tsv(row[1]).image(int(row[2])) if (row := _ROW.fullmatch(path)) else pathlib.Path(path).read_bytes()
    except (UserError, OSError) as e:
        raise BadImageError(f"{path!r} can't be read: {e}") from e
    image_size(data)
    return data


_decoded = functools.lru_cache(maxsize=1)(decode)


def around(data: bytes, region: tuple[float, float, float, float]) -> bytes:
    """JPEG of a region and what is around it: up to four times its area.

    GIT's code has a key for it with the value 4, and not the code (arXiv 2205.14100).

    Args:
      data: encoded image.
      region: (x0, y0, x1, y1) in pixels.

    Raises:
      BadImageError: no image, or no pixel of the region is in it.
    """
    pixels = _decoded(data)
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = region
    if min(x1, width) - max(x0, 0) < 1 or min(y1, height) - max(y0, 0) < 1:
        raise BadImageError(f"the region {region} is outside of {width}x{height} pixels")
    more_x, more_y = ((b - a) * (REGION_SIDES - 1) / 2 for a, b in ((x0, x1), (y0, y1)))
    left, top = (max(0, int(v)) for v in (x0 - more_x, y0 - more_y))
    return shards.encode_jpeg(pixels[top : round(y1 + more_y), left : round(x1 + more_x)])


def _read(format: str, splits: dict[str, list[str]]) -> tuple[dict[str, list[Item]], dict[str, Rejected]]:
    """Split -> its items, and split of the files -> what of them is left out."""
    items: dict[str, list[Item]] = {}
    left: dict[str, Rejected] = {}
    for split, paths in splits.items():
        rejected = left.setdefault(split, Rejected())
        for own, item in annotations.read(format, paths, split, rejected):
            items.setdefault(own, []).append(item)
    if "all" in items:
        raise UserError(
            f"{', '.join(splits['all'])} does not say which split is whose; use --train=…, --val=…, --test=…."
        )
    return {split: _identified(rows) for split, rows in items.items()}, left


def _identified(items: list[Item]) -> list[Item]:
    """Items with ids: those that have none get their file's name, with its folders where two would have the same."""
    stems: dict[str, set[str]] = {}
    for item in items:
        stems.setdefault(pathlib.PurePosixPath(item.image).stem, set()).add(item.image)
    plain = {stem for stem, names in stems.items() if len(names) == 1}

    def name(item: Item) -> str:
        stem = pathlib.PurePosixPath(item.image).stem
        return stem if stem in plain else item.image

    return [item if item.id else dataclasses.replace(item, id=name(item)) for item in items]


def find_files(names: Iterable[str], folder: str, suffixes: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """(file, why there is none) by the name that annotations give it: its path, from the folder or not, or see
    `capvl.data.reading.lookup.Names`.

    Raises:
      UserError: the folder does not exist.
    """
    root = pathlib.Path(folder)
    if folder and not root.is_dir():
        raise UserError(f"Folder {folder!r} does not exist.")
    known = lookup.Names(suffixes)
    for file in lookup.files(root.resolve(), suffixes) if folder else ():
        known.add(str(file), str(file))
    wanted = list(names)
    found = {name: path for name in wanted if (path := _as_it_stands(root, name))}
    others, why = known.find(name for name in wanted if name not in found)
    return {name: (path, "") for name, path in (found | others).items()} | {
        n: ("", reason) for n, reason in why.items()
    }


def _as_it_stands(root: pathlib.Path, name: str) -> str:
    """A name that is a path; "" where it is none."""
    if _ROW.fullmatch(name):
        return name
    for place in (root / name, pathlib.Path(name)):
        try:
            if place.is_file():
                return str(place)
        except (OSError, ValueError):  # Longer than a file's name can be.
            continue
    return ""
