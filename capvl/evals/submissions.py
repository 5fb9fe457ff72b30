"""Files of results as the evaluation servers take them."""

import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from capvl import storage
from capvl.errors import UserError, nearest


class Written(NamedTuple):
    """What the model wrote: about which image (its id or key), for which question ("" for captions), and the text."""

    image: str
    question: str
    text: str


class FoundBox(NamedTuple):
    """What was detected: in which image and of which class (their ids), x, y, width and height in pixels, the score."""

    image: str
    category: str
    box: tuple[float, float, float, float]
    score: float


# COCO's files are named by their ids in twelve digits.
_NUMBER = re.compile(r"0|[1-9]\d*|\d{12}", re.ASCII)


def _ids(texts: Iterable[str]) -> list[int | str]:
    """COCO's and VQA's ids are numbers. Where one of a file is none ("00123", TextCaps' hexadecimal ones), they are
    texts, all of them."""
    texts = list(texts)
    return [int(t) for t in texts] if all(_NUMBER.fullmatch(t) for t in texts) else texts


def _coco(rows: Sequence[Written]) -> Any:
    return [{"image_id": i, "caption": r.text} for i, r in zip(_ids(r.image for r in rows), rows, strict=True)]


def _vqa(rows: Sequence[Written]) -> Any:
    return [{"question_id": i, "answer": r.text} for i, r in zip(_ids(r.question for r in rows), rows, strict=True)]


def _vizwiz(rows: Sequence[Written]) -> Any:
    return [{"image": r.image, "answer": r.text} for r in rows]


def _clips(rows: Sequence[Written]) -> Any:
    return {r.image: r.text for r in rows}


def _gqa(rows: Sequence[Written]) -> Any:
    return [{"questionId": r.question, "prediction": r.text} for r in rows]


FORMATS = {
    "coco": _coco,  # COCO captions, nocaps, TextCaps, VizWiz captions.
    "vqa": _vqa,  # VQAv2, TextVQA, ST-VQA.
    "vizwiz": _vizwiz,
    "gqa": _gqa,
    "clips": _clips,  # VATEX and others: {video: caption}.
    "tsv": None,  # GIT's own: key TAB JSON.
}


def check(format: str) -> None:
    """Raises UserError where there is no such format."""
    if format not in FORMATS:
        raise UserError(f"The format {format!r} of a submission is unknown." + nearest(format, FORMATS))


_BY_QUESTION = ("vqa", "gqa")


def check_unique(format: str, rows: Iterable[Written]) -> None:
    """Raises UserError where a server could not tell two results apart, or a question has no id."""
    if format == "tsv":  # Its rows are told apart by image and question.
        return
    what = "question" if format in _BY_QUESTION else "image"
    seen: set[str] = set()
    for row in rows:
        name = getattr(row, what)
        if not name:
            raise UserError(f"The format {format!r} of a submission needs ids of {what}s, and the data set has none.")
        if name in seen:
            raise UserError(f"The format {format!r} of a submission can't tell two {what}s {name!r} apart.")
        seen.add(name)


def write(folder, name: str, format: str, rows: Sequence[Written]) -> None:
    """Writes folder/submissions/NAME.json (or .tsv), on the first host.

    Raises:
      UserError: it can't be written.
    """
    check(format)
    suffix = "tsv" if format == "tsv" else "json"
    text = _tsv(rows) if format == "tsv" else json.dumps(FORMATS[format](rows), ensure_ascii=False)
    _write(folder, f"{pathlib.PurePosixPath(name).name}.{suffix}", text)


def write_boxes(folder, name: str, boxes: Sequence[FoundBox]) -> None:
    """Writes folder/submissions/NAME.json, a list of detections as the servers of COCO, LVIS and ODinW (EvalAI) take
    it, on the first host.

    Raises:
      UserError: it can't be written.
    """
    ids = _ids(box.image for box in boxes), _ids(box.category for box in boxes)
    values = [
        {
            "image_id": image,
            "category_id": category,
            "bbox": [round(v, 3) for v in box.box],
            "score": round(box.score, 6),
        }
        for image, category, box in zip(*ids, boxes, strict=True)
    ]
    _write(folder, f"{pathlib.PurePosixPath(name).name}.json", json.dumps(values))


def _write(folder, name: str, text: str) -> None:
    if jax.process_index():
        return
    place = storage.folder(str(folder)) / "submissions"
    try:
        place.mkdir(parents=True, exist_ok=True)
        storage.replace_text(place / name, text)
    except OSError as e:
        raise UserError(f"The submission {name!r} can't be written to {str(place)!r}: {e.strerror or e}.") from e


_KEY = re.compile("[\t\r\n]")


def _tsv(rows: Sequence[Written]) -> str:
    lines, numbers = [], iter(_ids(row.question for row in rows if row.question))
    for row in rows:
        if row.question:
            value: Any = {"answer": row.text, "question_id": next(numbers)}
        else:
            value = [{"caption": row.text}]
        lines.append(f"{_KEY.sub(' ', row.image)}\t{json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)
