"""What texts an Example has: captions, a class's name, questions with their answers, what its regions are called."""

import dataclasses
import json
from typing import Any

import numpy as np

from capvl.data.reading import regions
from capvl.data.reading.decoders import CLOSED
from capvl.data.reading.sources import as_text

FEATURES = {"caption": "text", "classify": "class_name", "answer": "questions"}


def without_text(example: dict, features: tuple[str, ...]) -> bool:
    """Whether an Example lacks the text that an objective needs: each that it asks for, or any where it asks for
    several as "FEATURE?", of which names of regions are one, and a closed list of classes: it says of an image without
    regions that none of them is there; never where it asks for none."""
    asked = [feature for feature in features if feature.rstrip("?") in FEATURES.values()]
    needed = [_says(example.get(feature)) for feature in asked if not feature.endswith("?")]
    if needed or not asked:
        return not all(needed)
    if example.get(CLOSED) or any(_says(example.get(feature.rstrip("?"))) for feature in asked):
        return False
    return not (of_regions(features) and any(any(region.names) for region in regions.regions(example)))


def of_regions(features: tuple[str, ...]) -> tuple[str, ...]:
    """Those of an objective's features that say what regions are called."""
    return tuple(f for f in features if f in regions.FEATURES or f.rstrip("?") == CLOSED)


def _says(value: Any) -> bool:
    """Whether a feature that may be a text, a list of texts, or questions has any text in it."""
    if isinstance(value, dict):
        return len(value["question"]) > 0
    texts = [value] if isinstance(value, str | bytes) else () if value is None else value
    return any(text.strip() for text in texts)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with the answers that people gave, its kind and its id ("" where there are none)."""

    question: str
    answers: tuple[str, ...]
    kind: str = ""
    id: str = ""


def questions(value: Any) -> list[Question]:
    """Questions of a record's feature: a dict of lists, as tfds gives sequences, with `question`, `answer` or
    `answers` (lists, or JSON of them), and perhaps `kind` and `id`; None for none."""
    if value is None or not len(value["question"]):
        return []
    count = len(value["question"])
    given = value.get("answers", value.get("answer"))
    given = [()] * count if given is None else given
    blank = [""] * count
    rows = zip(value["question"], given, value.get("kind", blank), value.get("id", blank), strict=True)
    return [Question(as_text(q), _texts(a, "answers" in value), as_text(kind), as_text(i)) for q, a, kind, i in rows]


def _texts(value: Any, are_json: bool) -> tuple[str, ...]:
    if are_json and isinstance(value, str | bytes):
        try:
            listed = json.loads(value)
        except (ValueError, RecursionError):
            listed = None
        # A data set that was made elsewhere may have one answer here, as plain text.
        return (
            tuple(listed) if isinstance(listed, list) and all(isinstance(a, str) for a in listed) else (as_text(value),)
        )
    several = value if isinstance(value, list | tuple | np.ndarray) else [value]
    return tuple(map(as_text, several))
