"""Images by the names that an annotation file gives them: from a folder, or from a prepared data set."""

import pathlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from capvl.data.reading import sources
from capvl.errors import UserError
from capvl.lines import parse_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MISSING, SEVERAL = "file missing", "several files of that name"
NAMED_BY = ("image_id?", "key?", "json?")
# 000000000042 and COCO_val2014_000000000042 are image 42.
_COCO = re.compile(r"(?:.*_)?(\d{12})|0*(\d+)", re.ASCII)
_NUMBER = re.compile(r"0|[1-9]\d*", re.ASCII)


class Names:
    """Things by names with or without folders and suffix.

    Of all that have a name's last part, that is meant whose folders agree with the name's for the longest, then the
    one with the same suffix. Where that leaves two, the name stands for none of them; and where an annotation file
    has one file name in two folders, each must be found in its own.
    """

    def __init__(self, suffixes: Sequence[str] = SUFFIXES):
        """suffixes: that names may lack, or have another one of."""
        self._suffixes = suffixes
        self._by_stem: dict[str, list[tuple[tuple[str, ...], Any]]] = defaultdict(list)
        self._by_number: dict[int, list[Any]] = defaultdict(list)

    def add(self, name: str, value: Any) -> None:
        """One more thing."""
        parts = _parts(name)
        stem = self._stem(parts[-1]) if parts else ""
        self._by_stem[stem].append((parts, value))
        if match := _COCO.fullmatch(stem):
            self._by_number[int(match[1] or match[2])].append(value)

    def find(self, wanted: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
        """(name -> thing, name -> why there is none: MISSING or SEVERAL) of the names of an annotation file.

        A whole number without a file of that name is the image of this id, as COCO names them.
        """
        wanted = list(dict.fromkeys(wanted))
        folders = defaultdict(set)
        for name in wanted:
            parts = _parts(name)
            folders[parts[-1:]].add(parts[:-1])
        found, why = {}, {}
        for name in wanted:
            values = self._candidates(_parts(name), len(folders[_parts(name)[-1:]]) > 1)
            if not values and _NUMBER.fullmatch(name):
                values = self._by_number.get(int(name), [])
            if len(values) == 1:
                found[name] = values[0]
            else:
                why[name] = SEVERAL if values else MISSING
        return found, why

    def _candidates(self, parts: tuple[str, ...], whole: bool) -> list[Any]:
        """What fits a name best; with `whole` its folders must all agree."""
        best, values = (-1, False), []
        for own, value in self._by_stem.get(self._stem(parts[-1]), ()) if parts else ():
            agree = _agreeing(own[:-1], parts[:-1])
            if whole and agree < len(parts) - 1:
                continue
            score = (agree + (own == parts), own[-1] == parts[-1])
            if score >= best:
                values = [*values, value] if score == best else [value]
                best = score
        return values

    def _stem(self, name: str) -> str:
        path = pathlib.PurePosixPath(name)
        return path.stem if path.suffix.lower() in self._suffixes else name


def _parts(name: str) -> tuple[str, ...]:
    """A name's folders and file; Windows' \\ between them says the same as /."""
    return tuple(
        p for p in pathlib.PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/")).parts if p != "/"
    )


def _agreeing(own: tuple[str, ...], wanted: tuple[str, ...]) -> int:
    """How many folders are the same, counted from the file."""
    count = 0
    for a, b in zip(reversed(own), reversed(wanted), strict=False):
        if a != b:
            break
        count += 1
    return count


def open_images(where: str, data_dir: str = "") -> Names:
    """The images of a place by name; each is a function that reads the encoded image.

    Args:
      where: a folder of image files, or a prepared data set ("NAME" or "NAME:SPLIT" with +: every split
        by default), whose images go by `image_id`, and `image_id`, `file_name` and `key` of their JSON.
      data_dir: where prepared data sets are.

    Raises:
      UserError: neither is there.
    """
    place, found = pathlib.Path(where), Names()
    if place.is_dir() and not (place / "dataset_info.json").exists():
        for file in files(place, SUFFIXES):
            found.add(str(file), file.read_bytes)
        return found
    name, _, split = where.partition(":")
    try:
        splits = split.split("+") if split else sources.splits(name, data_dir)
        for part in splits:
            opened = sources.open_source(name, part, data_dir, features=("image",))
            for i, record in enumerate(opened.annotations(NAMED_BY)):
                for alias in names_in(record, i):
                    found.add(alias, lambda i=i, opened=opened: opened[i]["image"])
    except UserError as e:
        raise UserError(f"The images {where!r} are neither a folder nor a prepared data set: {e}") from e
    return found


def files(folder: pathlib.Path, suffixes: Sequence[str]) -> list[pathlib.Path]:
    """The files below a folder with one of some suffixes, but for those that macOS puts beside others ("._NAME")."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith("._"))


def names_of(opened: Any, index: int) -> list[str]:
    """Different names of a record of an opened data set; its number where it has none."""
    return names_in(opened.read(index, NAMED_BY), index)


def names_in(record: dict, index: int) -> list[str]:
    """Different names that a record of NAMED_BY goes by; its number where it has none."""
    return [n for n in dict.fromkeys(names(record)) if n] or [str(index)]


def names(record: dict) -> list[str]:
    """Names that a record of NAMED_BY goes by, the key only where there is no better one."""
    values = {k: sources.as_text(v) for k, v in record.items() if f"{k}?" in NAMED_BY}
    try:
        meta = parse_json(values.get("json") or "{}")
    except ValueError:
        meta = {}
    meta = meta if isinstance(meta, dict) else {}
    found = [
        str(v) for k in ("image_id", "file_name", "filename") if isinstance(v := meta.get(k), str | int) and v != ""
    ]
    found += [values["image_id"]] if values.get("image_id") else []
    return found or [values.get("key", "")]
