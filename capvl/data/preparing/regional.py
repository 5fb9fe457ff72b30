"""Regions of images as annotation files give them -> records of one validated schema.

Every format (`detections`, `groundings`) becomes the same `Annotated`; here it meets its image. What does not fit is
left out and counted, alone where it can be: a box, a phrase, else the whole image. Nothing is guessed.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from capvl.data.images.decode import BadImageError, decode, measure, turn_boxes
from capvl.data.reading.rejected import Rejected, RejectedError

Corners = tuple[float, float, float, float]
TURNED = ("refuse", "upright", "stored")
MAX_PHRASE = 300
EDGE = 1.0
"""Pixels that a box may end beyond the image's edge without being counted as cut: annotations are rounded."""
NO_CLASS = -1
NO_AREA = -1.0
LISTS = ("negative", "not_exhaustive")
"""Features of classes, by their names, that only some data sets have: of those that look for some in each image."""


class Phrase(NamedTuple):
    """A text that names something; where a caption has it: (caption, first character, end), -1 where none has; and of
    which kinds that is, such as ("people",) of Flickr30k Entities."""

    text: str
    sentence: int = -1
    start: int = -1
    end: int = -1
    kinds: tuple[str, ...] = ()


class Entity(NamedTuple):
    """Something in an image: all boxes of it, by all phrases that name it.

    Attributes:
      boxes: (x0, y0, x1, y1) each, in pixels, or fractions where the image's annotation says so.
      phrases: that name it.
      category: its class; "" for none.
      attributes: what it is like.
      areas: of each box what its annotation says that the thing itself covers, in square pixels; () where it says none.
      scores: of each box how sure a teacher is of it, 0 to 1; () where people drew them.
    """

    boxes: tuple[Corners, ...]
    phrases: tuple[Phrase, ...] = ()
    category: str = ""
    attributes: tuple[str, ...] = ()
    areas: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()


class Annotated(NamedTuple):
    """What annotations say of one image.

    Attributes:
      image: name of its file, with or without folders and suffix; "NAME:SPLIT#NUMBER" of a prepared data set; "" where
        `binary` holds it.
      id: what its source calls it.
      coco_id: the same image's number in COCO; "" where it isn't known to be there.
      size: (height, width) in pixels, by the annotation; None where it says nothing.
      text: captions.
      entities: what is in it.
      fractions: whether boxes are in fractions of the image.
      binary: base64 of the image.
      searched: whether it was searched for the classes of its data set: without any region it is an example, too.
      crowds: boxes of a class that hold several of it, or that don't count: no example to learn from, and what is
        detected there is neither right nor wrong.
      negative: classes that were looked for and are not in it, where only some are looked for in each image (LVIS).
      not_exhaustive: classes of which only some are annotated in it.
    """

    image: str
    id: str = ""
    coco_id: str = ""
    size: tuple[int, int] | None = None
    text: tuple[str, ...] = ()
    entities: tuple[Entity, ...] = ()
    fractions: bool = False
    binary: str = ""
    searched: bool = False
    crowds: tuple[Entity, ...] = ()
    negative: tuple[str, ...] = ()
    not_exhaustive: tuple[str, ...] = ()


def plain(item: Annotated) -> list:
    """As JSON has it."""
    return list(item)


def from_plain(row: list) -> Annotated:
    """The way back from JSON."""
    values = dict(zip(Annotated._fields, row, strict=True))
    for name in ("size", "text", "negative", "not_exhaustive"):
        values[name] = None if values[name] is None else tuple(values[name])
    for name in ("entities", "crowds"):
        values[name] = tuple(
            Entity(tuple(map(tuple, boxes)), _phrases_of(phrases), category, *map(tuple, lists))
            for boxes, phrases, category, *lists in values[name]
        )
    return Annotated(**values)


def _phrases_of(rows: list) -> tuple[Phrase, ...]:
    return tuple(Phrase(*where, tuple(kinds)) for *where, kinds in rows)


class Rules(NamedTuple):
    """What is let in.

    Attributes:
      max_phrase: characters of a phrase at most.
      turned: of TURNED: images that EXIF turns are refused, or their boxes are those of the upright image, or of the
        one that is stored. Where the annotation's size fits only one of the two, that one is meant.
      min_score: of boxes that a teacher found, at least.
    """

    max_phrase: int = MAX_PHRASE
    turned: str = "refuse"
    min_score: float = 0.0


def features(classes: list[str], listed: bool = False):
    """The schema of records: image, captions, boxes, and phrases and attributes of the boxes of their `chain`.

    Args:
      classes: names of a closed list, by label; [] for none.
      listed: whether each image lists the classes that were looked for in vain, and those not all of which are
        annotated.
    """
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    text, integer = tfds.features.Text, np.int64
    label = tfds.features.ClassLabel(names=classes) if classes else integer
    # The area is what the thing itself covers in square pixels, where its annotation says it, else -1.
    box = {"bbox": tfds.features.BBoxFeature(), "label": label, "category": text(), "area": np.float32}
    lists = {name: tfds.features.Sequence(text()) for name in LISTS} if listed else {}
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "image_id": text(),
            "source": text(),
            # Of the same image in COCO, by which images of evaluations are told.
            "coco_id": text(),
            "file_name": text(),
            "height": integer,
            "width": integer,
            "text": tfds.features.Sequence(text()),
            "boxes": tfds.features.Sequence(box | {"chain": text()}),
            "crowds": tfds.features.Sequence(box),
            # `sentence` is the caption that has the phrase from character `start` to `end`; -1 where none has. `kinds`
            # of what is named have commas between them.
            "phrases": tfds.features.Sequence(
                {"phrase": text(), "chain": text(), "sentence": integer, "start": integer, "end": integer}
                | {"kinds": text()}
            ),
            "attributes": tfds.features.Sequence({"attribute": text(), "chain": text()}),
        }
        | lists
    )


def to_example(
    item: Annotated,
    data: bytes,
    source: str,
    labels: dict[str, int],
    rules: Rules,
    left: Rejected,
    changed: Rejected,
    listed: bool = False,
) -> dict:
    """A record in the schema.

    Args:
      item: annotations of the image.
      data: the encoded image.
      source: what the data set comes from.
      labels: class -> label, of the classes that have one.
      rules: what is let in.
      left: is told of boxes and phrases that are left out.
      changed: is told of what is kept in another form.
      listed: see `features`.

    Raises:
      RejectedError: the image is left out, with the reason.
    """
    name = item.id or item.image
    try:
        height, width, orientation = measure(data)
        decode(data, 32, 32)
    except BadImageError as e:
        raise RejectedError("truncated image" if "truncated" in str(e) else "undecodable image") from e
    orientation = _orientation(item.size, (height, width), orientation, rules)
    texts, moved = _texts(item.text, name, left)
    record = {"boxes": [], "phrases": [], "attributes": [], "crowds": []}
    seen: set[tuple] = set()
    at = item.fractions, (height, width), orientation, rules.min_score
    for number, entity in enumerate(item.crowds):
        boxes = _boxes(entity, *at, f"{name}, crowd {number}", left, changed)
        record["crowds"] += _rows(boxes, entity, labels)
    for number, entity in enumerate(item.entities):
        place = f"{name}, region {number}"
        boxes = _boxes(entity, *at, place, left, changed)
        if not boxes:
            continue
        phrases = _phrases(entity, item.text, moved, rules, place, left)
        if entity.phrases and not phrases and not entity.category:
            left.count("region without a phrase left", place)
            continue
        if (same := (tuple(boxes), *entity[1:4])) in seen:
            left.count("region that is there twice", place)
            continue
        seen.add(same)
        _add(record, str(number), boxes, phrases, entity, labels)
    # Where what there was is all bad, the image is no example of one without.
    if not record["boxes"] and (item.entities or not item.searched):
        raise RejectedError("no region left" if item.entities else "no region")
    own = {"image": data, "image_id": item.id, "source": source, "coco_id": item.coco_id, "file_name": item.image}
    lists = {what: list(getattr(item, what)) for what in LISTS} if listed else {}
    return own | {"height": height, "width": width, "text": texts} | record | lists


def _orientation(said: tuple[int, int] | None, upright: tuple[int, int], orientation: int, rules: Rules) -> int:
    """By which boxes are turned upright; 1 where they are."""
    stored = upright[::-1] if orientation >= 5 else upright
    if said is not None and said not in (upright, stored):
        raise RejectedError("image has another size than its annotation says")
    if orientation == 1:
        return 1
    if said is not None and upright != stored:
        return 1 if said == upright else orientation
    if rules.turned == "refuse":
        raise RejectedError("EXIF turns the image, and nothing says which way its boxes are")
    return 1 if rules.turned == "upright" else orientation


def _texts(texts: tuple[str, ...], name: str, left: Rejected) -> tuple[list[str], dict[int, int]]:
    """Captions that say something, and old number -> new one."""
    kept, moved = [], {}
    for number, text in enumerate(texts):
        if says_something(text):
            moved[number] = len(kept)
            kept.append(text)
        else:
            left.count("caption says nothing", name)
    return kept, moved


def says_something(text: str) -> bool:
    """Whether a text has a letter or a digit: cleaning would leave nothing of others."""
    return any(character.isalnum() for character in text)


def _boxes(
    entity: Entity,
    fractions: bool,
    size: tuple[int, int],
    orientation: int,
    min_score: float,
    place: str,
    left: Rejected,
    changed: Rejected,
) -> dict[Corners, float]:
    """Boxes of an entity in fractions of the upright image, cut at its edges, each once; with their areas."""
    height, width = size
    stored = (width, height) if orientation >= 5 else (height, width)
    scale = np.array([1, 1, 1, 1]) if fractions else np.array([stored[1], stored[0]] * 2)
    found: dict[Corners, float] = {}
    areas, scores = entity.areas or [NO_AREA] * len(entity.boxes), entity.scores or [1.0] * len(entity.boxes)
    for box, area, score in zip(entity.boxes, areas, scores, strict=True):
        if score < min_score:
            left.count("score below --min_score", place)
            continue
        if not all(map(math.isfinite, box)):
            left.count("box is not of numbers", place)
            continue
        if not (box[0] < box[2] and box[1] < box[3]):
            left.count("box of no area", place)
            continue
        if not fractions and min(box) >= 0 and max(box) <= 1 and not all(float(side).is_integer() for side in box):
            left.count("box is in fractions, where pixels are due", place)
            continue
        whole = turn_boxes(np.asarray([box], np.float64) / scale[None], orientation)[0]
        cut = np.clip(whole, 0.0, 1.0)
        # As it is stored: a box that is thinner than a float32 is none.
        cut = cut.astype(np.float32)
        if not (cut[0] < cut[2] and cut[1] < cut[3]):
            left.count("box outside of the image", place)
            continue
        if (np.abs(whole - cut) * np.array([width, height] * 2)).max() > EDGE:
            changed.count("box cut at the image's edge", place)
        key = tuple(map(float, cut))
        if key in found:
            left.count("box that is there twice", place)
        found.setdefault(key, area)
    return found


def _phrases(entity: Entity, texts, moved: dict[int, int], rules: Rules, place: str, left: Rejected) -> list[Phrase]:
    """Phrases of an entity that are as they should be, with the captions' new numbers."""
    kept = []
    for phrase in entity.phrases:
        if not says_something(phrase.text):
            left.count("phrase says nothing", place)
        elif len(phrase.text) > rules.max_phrase:
            left.count("phrase too long", place)
        elif phrase.sentence < 0:
            kept.append(phrase)
        elif not (phrase.sentence < len(texts) and 0 <= phrase.start < phrase.end <= len(texts[phrase.sentence])):
            left.count("phrase not in its caption", place)
        elif phrase.sentence in moved:
            kept.append(phrase._replace(sentence=moved[phrase.sentence]))
    # What two people say of a region alone counts twice, as in RefCOCO.
    return [p for i, p in enumerate(kept) if p.sentence < 0 or p not in kept[:i]]


def _rows(boxes: dict[Corners, float], entity: Entity, labels: dict[str, int]) -> list[dict]:
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    kind = {"label": labels.get(entity.category, NO_CLASS), "category": entity.category}
    return [
        {"bbox": tfds.features.BBox(y0, x0, y1, x1), "area": area} | kind for (x0, y0, x1, y1), area in boxes.items()
    ]


def _add(record: dict, chain: str, boxes, phrases: list[Phrase], entity: Entity, labels: dict[str, int]) -> None:
    record["boxes"] += [row | {"chain": chain} for row in _rows(boxes, entity, labels)]
    for text, *where, kinds in phrases:
        where = dict(zip(("sentence", "start", "end"), where, strict=True))
        record["phrases"].append({"phrase": text, "chain": chain, "kinds": ",".join(kinds)} | where)
    record["attributes"] += [{"attribute": a, "chain": chain} for a in dict.fromkeys(entity.attributes)]


def places(phrase: str, caption: str) -> list[tuple[int, int]]:
    """(first character, end) of every place of a caption where a phrase stands as whole words, whatever the letters'
    case."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    if not words:
        return []
    return [m.span() for m in re.finditer(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE)]
