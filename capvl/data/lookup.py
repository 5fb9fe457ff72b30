"""Images by the names that an annotation file gives them: from a folder, or from a prepared data set."""

import json
import pathlib
from collections.abc import Callable

from capvl.data import sources
from capvl.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def open_images(where: str, data_dir: str = "") -> dict[str, Callable[[], bytes]]:
    """name without folders and suffix -> a function that reads the encoded image.

    Args:
      where: a folder of image files, or a prepared data set ("NAME" or "NAME:SPLIT" with +: every split
        by default), whose images go by `image_id`, `file_name` and `key` of their JSON.
      data_dir: where prepared data sets are.

    Raises:
      UserError: neither is there.
    """
    place = pathlib.Path(where)
    if place.is_dir() and not (place / "dataset_info.json").exists():
        files = (p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
        return {p.stem: p.read_bytes for p in files}
    found: dict[str, Callable[[], bytes]] = {}
    name, _, split = where.partition(":")
    try:
        splits = split.split("+") if split else sources.splits(name, data_dir)
        for part in splits:
            opened = sources.open_source(name, part, data_dir, features=("image", "key", "json"))
            for i in range(len(opened)):
                for alias in names(opened.read(i, ("key", "json"))):
                    found[alias] = lambda i=i, opened=opened: opened[i]["image"]
    except UserError as e:
        raise UserError(f"The images {where!r} are neither a folder nor a prepared data set: {e}") from e
    return found


def names(record: dict) -> list[str]:
    """Names that a record with `key` and `json` goes by, the key only where there is no better one."""
    values = {k: sources.as_text(v) for k, v in record.items() if k in ("key", "json")}
    try:
        meta = json.loads(values["json"] or "{}")
    except ValueError:
        meta = {}
    found = [str(meta[k]) for k in ("image_id", "file_name", "filename") if meta.get(k)]
    return [stem(name) for name in found or [values["key"]]]


def stem(name: str) -> str:
    """What a name of an annotation file is looked up by."""
    return pathlib.PurePosixPath(name).stem
