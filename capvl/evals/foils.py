"""Tests of compositional understanding: captions, and foils that are wrong by a little. From the tests' own files, or
made of a data set.

SugarCrepe (arXiv 2306.14610), ARO (2210.01936) with its NegCLIP format, Winoground (2204.03162), VALSE (2112.07566).
"""

import ast
import csv
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from capvl.data.reading import lookup, sources
from capvl.data.reading.rejected import Rejected
from capvl.data.scenes import language
from capvl.errors import UserError, nearest
from capvl.lines import parse_json, read_json, read_text, split


@dataclasses.dataclass(frozen=True)
class Foil:
    """One question: which caption belongs to which image?

    Attributes:
      group: kind of difference, such as "swap_att".
      images: file names of its images; Winoground has two, the others one.
      captions: the right one first (for Winoground, caption i belongs to image i).
      box: (left, top, right, bottom) in pixels of the part of the image that is meant; None for the whole.
    """

    group: str
    images: tuple[str, ...]
    captions: tuple[str, ...]
    box: tuple[int, int, int, int] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """What tells its images from others: two parts of an image are two images."""
        return tuple(name if self.box is None else f"{name}{list(self.box)}" for name in self.images)


def _rows(file: pathlib.Path, what: str) -> Iterator[tuple[str, dict]]:
    """(id, row) of a JSON object, a JSON list, JSON lines, or a table with a header and tabs or commas."""
    label = f"The {what} file"
    try:
        if file.suffix == ".jsonl":
            values: Any = [parse_json(line) for line in split(read_text(file, label)) if line.strip()]
        elif file.suffix in (".tsv", ".csv"):
            lines = (line + "\n" for line in split(read_text(file, label)))
            values = list(csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ","))
        else:
            values = read_json(file, label)
    except (ValueError, csv.Error) as e:
        raise UserError(f"{label} {str(file)!r} can't be read: {e}.") from e
    if not isinstance(values, dict | list):
        raise UserError(f"{label} {str(file)!r} should be a list or an object of rows.")
    rows = values.items() if isinstance(values, dict) else enumerate(values)
    for key, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"Row {key} of the {what} file {str(file)!r} is not an object.")
        yield str(key), row


def _sugarcrepe(group: str, row: dict) -> Foil:
    return Foil(row.get("subset") or group, (row["filename"],), (row["caption"], row["negative_caption"]))


def _aro(group: str, row: dict) -> Foil:
    if "true_caption" in row:
        return Foil(group, (row["image_path"],), (row["true_caption"], row["false_caption"]), _box(row))
    if isinstance(row.get("caption"), list):
        raise UserError(
            "The captions of ARO's order tests have no foils in the file, as its code makes them when it runs: prepare "
            "the captions as a data set and take format='order', or a file with caption_options."
        )
    captions = row.get("caption_options") or row["captions"]
    if isinstance(captions, str):
        raise ValueError("several captions")
    return Foil(group, (row.get("image_path") or row["image"],), tuple(captions))


def _box(row: dict) -> tuple[int, int, int, int] | None:
    """ARO cuts images to a row's box before anything else."""
    if not any(key.startswith("bbox_") for key in row):
        return None
    values = [row[f"bbox_{key}"] for key in "xywh"]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1 << 20 for v in values)
    if not numbers or min(values[2:]) < 1:
        raise ValueError("a box of numbers of pixels with a width and a height")
    x, y, width, height = values
    return tuple(map(round, (x, y, x + width, y + height)))


def _negclip(group: str, row: dict) -> Foil | None:
    """NegCLIP's table has Python's lists in its cells; a row without negatives asks nothing."""
    negatives = row.get("negative_captions") or row["neg_caption"]
    if isinstance(negatives, str) and negatives.lstrip().startswith("["):
        negatives = ast.literal_eval(negatives.strip())
    negatives = [negatives] if isinstance(negatives, str) else negatives
    negatives = [n for n in negatives if not isinstance(n, str) or n.strip() not in ("", "None", "nan")]
    if not negatives:
        return None
    return Foil(group, (row["filepath"],), (row.get("caption") or row["title"], *negatives))


def _winoground(group: str, row: dict) -> Foil:
    images = tuple(name if "." in name else name + ".png" for name in (row["image_0"], row["image_1"]))
    return Foil(row.get("collapsed_tag") or group, images, (row["caption_0"], row["caption_1"]))


def _valse(group: str, row: dict) -> Foil | None:
    """Kept where at least two of three annotators chose the caption, as in the paper."""
    votes = (row.get("mturk") or {}).get("caption", 3)
    return Foil(group, (row["image_file"],), (row["caption"], row["foil"])) if votes >= 2 else None


FORMATS: dict[str, Callable[[str, dict[str, Any]], Foil | None]] = {
    "sugarcrepe": _sugarcrepe,
    "aro": _aro,
    "negclip": _negclip,
    "winoground": _winoground,
    "valse": _valse,
}


SUFFIXES = (".json", ".jsonl", ".tsv", ".csv")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def plain(questions: list[Foil]) -> list[Foil]:
    """The same in lower case, without punctuation and with single spaces; without foils that then are no others."""
    kept = []
    for question in questions:
        right, *wrong = (" ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", c.lower())) for c in question.captions)
        wrong = [w for w in dict.fromkeys(wrong) if w != right and w]
        if right and wrong:
            kept.append(dataclasses.replace(question, captions=(right, *wrong)))
    return kept


def of_captions(name: str, data_dir: str, seed: int) -> list[Foil]:
    """Order tests of a data set's own captions, after ARO's (arXiv 2210.01936, section 2.3): for each image its first
    caption, with all words shuffled, and with two different words swapped; a function of (seed, index).

    Args:
      name: a prepared data set and one of its splits, "NAME:SPLIT".
      data_dir: where prepared data sets are.
      seed: of the foils.

    Raises:
      UserError: the data set is not there.
    """
    dataset, _, split = name.partition(":")
    source = sources.open_source(dataset, split, data_dir, features=("text",))
    questions = []
    for i, record in enumerate(source.annotations(("text", *lookup.NAMED_BY))):
        words = sources.as_text(record["text"][0]).lower().rstrip(" .!?").split() if record["text"] else []
        if len(set(words)) < 2:
            continue
        rng = np.random.default_rng([seed, i])
        first = int(rng.integers(len(words)))
        second = int(rng.choice([j for j, w in enumerate(words) if w != words[first]]))
        swapped = list(words)
        swapped[first], swapped[second] = words[second], words[first]
        shuffled = list(words)
        while shuffled == words:
            shuffled = [words[j] for j in rng.permutation(len(words))]
        image = lookup.names_in(record, i)[0]
        for group, foil in (("shuffled", shuffled), ("swapped", swapped)):
            questions.append(Foil(group, (image,), (" ".join(words), " ".join(foil))))
    return questions


def of_scenes(name: str, data_dir: str, seed: int) -> list[Foil]:
    """Foils of embedded scenes, two of each image, whose words are the caption's own in another order; a function of
    (seed, index):

      attribute: two things in a list, and the same with their colours swapped, where neither is there then;
      relation: one thing left of, right of, above or below another, and the same with the things swapped.

    Things are named by colour and shape, as `capvl.data.scenes.language` has them; words are no things here.

    Args:
      name: a scenes data set and one of its splits, "NAME:SPLIT".
      data_dir: where prepared data sets are.
      seed: which things of a scene are asked for.

    Raises:
      UserError: the data set is not there, or is none of scenes.
    """
    dataset, _, split = name.partition(":")
    source = sources.open_source(dataset, split, data_dir, features=("objects?",))
    questions = []
    for i, record in enumerate(source.annotations(("objects?", *lookup.NAMED_BY))):
        rows, rng = record.get("objects", {}), np.random.default_rng([seed, i])
        if "color" not in rows or "shape" not in rows:
            raise UserError(f"The format 'scenes' needs an embedded data set, such as scenes/demo, not {dataset!r}.")
        things = [
            (sources.as_text(color), sources.as_text(shape), (x0 + x1) / 2, (y0 + y1) / 2)
            for (y0, x0, y1, x1), color, shape in zip(rows["bbox"], rows["color"], rows["shape"], strict=True)
            if sources.as_text(shape) != "word"
        ]
        if len(things) < 2:
            continue
        image, there = lookup.names_in(record, i)[0], {thing[:2] for thing in things}
        first, second = (things[k] for k in rng.permutation(len(things))[:2])
        a, b = (language.a(f"{color} {shape}") for color, shape, *_ in (first, second))
        where = language.relation(*(Place(*thing[2:]) for thing in (first, second)))
        questions.append(Foil("relation", (image,), (f"{a} {where} {b}", f"{b} {where} {a}")))
        swapped = (second[0], first[1]), (first[0], second[1])
        if not there & set(swapped):
            other = " and ".join(language.a(" ".join(thing)) for thing in swapped)
            questions.append(Foil("attribute", (image,), (f"{a} and {b}", other)))
    return questions


class Place(NamedTuple):
    """The centre of a thing."""

    x: float
    y: float


def read(format: str, path: str, left: Rejected | None = None) -> list[Foil]:
    """All questions of a file, or of all .json, .jsonl, .tsv and .csv files of a folder; a file's name is their group.

    Args:
      format: a key of FORMATS.
      path: of the file or folder.
      left: is told of rows that ask nothing.

    Raises:
      UserError: unknown format, missing file, or a row that isn't of this format.
    """
    if format not in FORMATS:
        raise UserError(f"The format {format!r} of a compositionality test is unknown." + nearest(format, FORMATS))
    place = pathlib.Path(path)
    files = sorted(p for p in place.iterdir() if p.suffix in SUFFIXES) if place.is_dir() else [place]
    if not files or not files[0].exists():
        raise UserError(
            f"The {format} file {path!r} is missing; it should be that test's file, or a folder with its .json files."
        )
    foils = []
    for file in files:
        for key, row in _rows(file, format):
            try:
                foil = FORMATS[format](file.stem, row)
            except UserError as e:
                raise UserError(f"{str(file)!r}: {e}") from e
            except (KeyError, TypeError, ValueError, AttributeError, SyntaxError, RecursionError, MemoryError) as e:
                what = f"it lacks {e}" if isinstance(e, KeyError | ValueError) else f"{type(e).__name__} {e}"
                raise UserError(f"Row {key} of {str(file)!r} is not of the format {format}: {what}.") from e
            if foil is None:
                if left is not None:
                    left.count(
                        "annotators did not agree" if format == "valse" else "no foil", f"row {key} of {file.name}"
                    )
                continue
            _check(foil, f"Row {key} of {str(file)!r}")
            foils.append(foil)
    if not foils:
        raise UserError(f"The {format} file {path!r} has no rows.")
    return foils


def _check(foil: Foil, where: str) -> None:
    if not all(isinstance(c, str) and c.strip() for c in foil.captions):
        raise UserError(f"{where} has an empty caption.")
    if not isinstance(foil.group, str):
        raise UserError(f"{where} has no text for its group.")
    if len(foil.captions) < 2:
        raise UserError(f"{where} has a caption without a foil.")
    if not all(isinstance(name, str) and name for name in foil.images):
        raise UserError(f"{where} names no image.")
    if any(_SURROGATE.search(text) for text in (*foil.captions, *foil.images)):
        raise UserError(f"{where} has half of a surrogate pair in a text.")
