"""Few-shot training sets: a few images of each class, chosen as in GLIP's few-shot experiments (arXiv 2112.03857)."""

import random
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import numpy as np

from capvl.data.reading import sources
from capvl.data.reading.regions import regions
from capvl.errors import UserError


def choose(classes: Sequence[Collection[Hashable]], shots: int, seed: int = 0) -> list[int]:
    """Which images are trained on, in order.

    An image is taken where one of its classes still lacks images; it then counts for all of its classes, so a class
    that stands beside rarer ones gets more than `shots`. One without a class is never taken.

    Args:
      classes: of each image, those of its boxes.
      shots: K, images of each class.
      seed: 0 for the images' order; another shuffles those that have a class first, as Python's `random.Random(seed)`
        does (GLIP's are 3, 30 and 300).
    """
    order = [i for i, own in enumerate(classes) if own]
    if seed:
        random.Random(seed).shuffle(order)
    left = {name: shots for own in classes for name in own}
    chosen = []
    for i in order:
        own = set(classes[i])
        if any(left[name] > 0 for name in own):
            chosen.append(i)
            for name in own:
                left[name] -= 1
    return chosen


def few_shot(source: sources.Source, shots: int, seed: int) -> sources.Subset:
    """The chosen images of a prepared data set, which is walked by `image_id` (as numbers where all are), or else as it
    stands.

    Raises:
      UserError: it has no classes.
    """
    asked = ("objects?", "boxes?", "label?", "image_id?")
    rows = list(source.annotations(asked))
    ids = [sources.as_text(row.get("image_id", "")) for row in rows]
    order = range(len(rows))
    if all(ids):
        numbers = all(name.isdecimal() for name in ids)
        order = sorted(order, key=lambda i: int(ids[i]) if numbers else ids[i])
    classes = [classes_of(rows[i]) for i in order]
    if not any(classes):
        raise UserError(f"data.shots={shots}: data set {source.name!r} has neither boxes with classes nor labels.")
    return sources.Subset(source, np.array([order[i] for i in choose(classes, shots, seed)]))


def classes_of(example: dict[str, Any]) -> set[Hashable]:
    """The classes of an Example's boxes, by number or else by name; where boxes have none, its own label."""
    rows = example.get("objects", example.get("boxes", {}))
    if "label" in rows or "category" in rows:
        return {region.label if region.label >= 0 else region.category for region in regions(example)} - {""}
    return {int(example["label"])} if "label" in example else set()
