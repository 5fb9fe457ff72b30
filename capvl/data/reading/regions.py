"""What regions an Example has: boxes with their phrases, classes and attributes, and where its captions name them."""

import collections
import dataclasses
import re
from typing import Any

from capvl.data.reading.decoders import class_names
from capvl.data.reading.sources import as_text

FEATURES = ("objects?", "boxes?", "phrases?", "attributes?")
"""Features that `regions` reads, in the form of `Source`'s: those that a data set has. With "text" beside them, the
captions' words of shards become characters."""
DETECTION = ("crowds?", "negative?", "not_exhaustive?")
"""Features that `crowds` and `looked_for` read, beside those of regions."""

Span = tuple[int, int, int]
"""(caption, first character, end): what a caption has there names a region."""


@dataclasses.dataclass(frozen=True)
class Region:
    """A box of an image and what is said of it.

    Attributes:
      box: (x0, y0, x1, y1) in fractions of the upright image.
      phrases: what it is called, by one phrase or several.
      label, category: its class, by number and by name; -1 and "" where it has none.
      attributes: what it is like: "red", "striped".
      spans: where the captions name it, in order; () where that isn't known. Characters of the caption as text.
      chain: boxes of one thing have the same; names nothing beyond its image.
      area: what the thing itself covers, by its annotation, in square pixels of the image as it was annotated; -1 where
        that isn't said. COCO's small, medium and large go by it, and not by the box.
    """

    box: tuple[float, float, float, float]
    phrases: tuple[str, ...] = ()
    label: int = -1
    category: str = ""
    attributes: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    chain: str = dataclasses.field(default="", compare=False)
    area: float = -1.0

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be called: its phrases, else its class."""
        return self.phrases or ((self.category,) if self.category else ())


def regions(example: dict[str, Any]) -> list[Region]:
    """The regions of an Example, in its order; [] where it has none. Crowds are none (`crowds`).

    They stand in `objects`, with a phrase each (scenes) or a label (data sets of tfds), or in `boxes`, where phrases of
    `phrases` and attributes of `attributes` belong to the boxes of their chain (`capvl.data.preparing.regional` and
    `shards`). tfds gives boxes as (y0, x0, y1, x1); here x comes first.
    """
    rows = example.get("objects", example.get("boxes"))
    if rows is None:
        return []
    if "objects" in example:
        return _objects(rows)
    phrases, spans, attributes = _phrases(example), _spans(example), collections.defaultdict(list)
    told = example.get("attributes", {"chain": (), "attribute": ()})
    for chain, attribute in zip(told["chain"], told["attribute"], strict=True):
        attributes[as_text(chain)].append(as_text(attribute))
    found = []
    for bbox, chain, *named, area in zip(
        rows["bbox"], _texts(rows, "chain"), *_classes(rows), _areas(rows), strict=True
    ):
        said = tuple(phrases[chain]), *named, _once(attributes[chain]), _once(spans[chain])
        found.append(Region(_box(bbox), *said, chain, area))
    return found


def crowds(example: dict[str, Any]) -> list[Region]:
    """Boxes of an Example that hold several things of one class, or that don't count ("difficult"): nothing is learned
    from them, and what is detected there is neither right nor wrong.

    Args:
      example: with "crowds" (region data sets), or "objects" (data sets of tfds, whose `is_crowd` says it).
    """
    if "crowds" in example:
        rows = example["crowds"]
        named = zip(rows["bbox"], *_classes(rows), _areas(rows), strict=True)
        return [Region(_box(bbox), (), *kind, area=area) for bbox, *kind, area in named]
    rows = example.get("objects", {})
    return _objects(rows, True) if "is_crowd" in rows else []


def looked_for(example: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(classes that are not in the image, classes that are there more often than annotated), where a data set looks for
    some classes in each image, as LVIS does: nothing is known of the others but those of the boxes. None where every
    image was searched for all classes.

    Args:
      example: with "negative" and "not_exhaustive", where its data set has them (`DETECTION`).
    """
    if "negative" not in example:
        return None
    negative, more = (tuple(map(as_text, example.get(name, ()))) for name in ("negative", "not_exhaustive"))
    return negative, more


def kinds(example: dict[str, Any]) -> dict[tuple[str, Span], tuple[str, ...]]:
    """(chain, span) of a phrase -> of which kinds what it names is, such as ("people",); {} where a data set doesn't
    say it.

    Args:
      example: with "phrases".
    """
    rows = example.get("phrases", {})
    if "kinds" not in rows:
        return {}
    keys = zip(*(rows[key] for key in ("chain", "sentence", "start", "end", "kinds")), strict=True)
    return {
        (as_text(chain), tuple(map(int, span))): tuple(filter(None, as_text(own).split(",")))
        for chain, *span, own in keys
    }


def categories(source: Any) -> list[str]:
    """Names of the classes that boxes of a prepared data set have, by label; [] where there is no closed list.

    Args:
      source: of `capvl.data.reading.sources.open_source`.
    """
    return list(class_names(source.info.features))


def _objects(rows: dict[str, Any], crowded: bool = False) -> list[Region]:
    count = len(rows["bbox"])
    phrases = [(as_text(p),) for p in rows["phrase"]] if "phrase" in rows else [()] * count
    told = rows.get("is_crowd", [False] * count)
    found = enumerate(zip(rows["bbox"], phrases, *_classes(rows), _areas(rows), told, strict=True))
    return [
        Region(_box(bbox), *named, chain=str(i), area=area)
        for i, (bbox, *named, area, crowd) in found
        if bool(crowd) == crowded
    ]


def _classes(rows: dict[str, Any]) -> tuple[list[int], list[str]]:
    return [int(label) for label in rows.get("label", [-1] * len(rows["bbox"]))], _texts(rows, "category")


def _areas(rows: dict[str, Any]) -> list[float]:
    return [float(area) for area in rows.get("area", [-1.0] * len(rows["bbox"]))]


def _texts(rows: dict[str, Any], name: str) -> list[str]:
    return [as_text(value) for value in rows.get(name, [""] * len(rows["bbox"]))]


def _once(values: list) -> tuple:
    return tuple(dict.fromkeys(values))


def _phrases(example: dict[str, Any]) -> dict[str, list[str]]:
    """chain -> its phrases; what captions say once, what was said of the region alone as often as it was."""
    said = collections.defaultdict(list)
    named = example.get("phrases", {"chain": (), "phrase": ()})
    sentences = named.get("sentence", (0,) * len(named["chain"]))
    for chain, phrase, sentence in zip(named["chain"], map(as_text, named["phrase"]), sentences, strict=True):
        own = said[as_text(chain)]
        if sentence < 0 or phrase not in own:
            own.append(phrase)
    return said


def _spans(example: dict[str, Any]) -> dict[str, list[Span]]:
    """chain -> where captions name it. Shards count words, as `str.split` has them."""
    found = collections.defaultdict(list)
    rows = example.get("phrases", {})
    if "start" in rows:
        for chain, sentence, *ends in zip(*(rows[k] for k in ("chain", "sentence", "start", "end")), strict=True):
            if sentence >= 0:
                found[as_text(chain)].append((int(sentence), *map(int, ends)))
    elif "first_word" in rows and "text" in example:
        words = [[m.span() for m in re.finditer(r"\S+", as_text(caption))] for caption in example["text"]]
        keys = ("chain", "sentence", "first_word", "num_words")
        for chain, sentence, first, count in zip(*(rows[k] for k in keys), strict=True):
            if count and sentence < len(words) and first + count <= len(words[sentence]):
                own = words[sentence]
                found[as_text(chain)].append((int(sentence), own[first][0], own[first + count - 1][1]))
    return found


def _box(bbox) -> tuple[float, float, float, float]:
    y0, x0, y1, x1 = map(float, bbox)
    return x0, y0, x1, y1
