"""What regions an Example has: boxes with their phrases, classes, or both."""

import collections
import dataclasses
from typing import Any

from capvl.data.reading.sources import as_text


@dataclasses.dataclass(frozen=True)
class Region:
    """A box of an image and what is said of it.

    Attributes:
      box: (x0, y0, x1, y1) in fractions of the upright image.
      phrases: what it is called, by one phrase or several.
      label, category: its class, by number and by name; -1 and "" where it has none.
    """

    box: tuple[float, float, float, float]
    phrases: tuple[str, ...] = ()
    label: int = -1
    category: str = ""


def regions(example: dict[str, Any]) -> list[Region]:
    """The regions of an Example, in its order; [] where it has none.

    They stand in `objects`, with a phrase each (scenes) or a label (data sets of tfds), or in `boxes`, where phrases of
    `phrases` belong to the boxes of their chain (`capvl.data.preparing.shards`). tfds gives boxes as (y0, x0, y1, x1);
    here x comes first.
    """
    rows = example.get("objects", example.get("boxes"))
    if rows is None:
        return []
    said = collections.defaultdict(list)
    if "objects" not in example:
        named = example.get("phrases", {"chain": (), "phrase": ()})
        for chain, phrase in zip(named["chain"], named["phrase"], strict=True):
            said[as_text(chain)].append(as_text(phrase))
    count = len(rows["bbox"])
    phrases = [(as_text(p),) for p in rows["phrase"]] if "phrase" in rows else None
    if phrases is None:
        phrases = [tuple(dict.fromkeys(said[as_text(chain)])) for chain in rows.get("chain", [""] * count)]
    labels = [int(label) for label in rows.get("label", [-1] * count)]
    categories = [as_text(category) for category in rows.get("category", [""] * count)]
    found = zip(rows["bbox"], phrases, labels, categories, strict=True)
    return [Region(_box(bbox), *of) for bbox, *of in found]


def _box(bbox) -> tuple[float, float, float, float]:
    y0, x0, y1, x1 = map(float, bbox)
    return x0, y0, x1, y1
