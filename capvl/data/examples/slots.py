"""Lists of unequal lengths in fixed slots: regions with a phrase each, boxes with a class, the texts of an image.

A batch has one shape, so a list has so many slots and a mask that says which are taken. An image-text pair is an image
with one slot that holds the whole image (`capvl.data.images.geometry.WHOLE`).
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from capvl.data.randomness import Uniforms

T = TypeVar("T")
Row = Mapping[str, np.ndarray]


def choose(things: Sequence[T], slots: int, uniforms: Uniforms | None) -> list[T]:
    """Those of a list that get a slot, at most so many.

    Args:
      things: the list.
      slots: how many there are.
      uniforms: in training: they are drawn one after another, none twice; None in evaluation: the first ones.
    """
    if uniforms is None:
        return list(things[:slots])
    left = list(things)
    return [left.pop(uniforms.below(len(left))) for _ in range(min(slots, len(left)))]


def fill(
    rows: Sequence[Mapping[str, np.ndarray]], slots: int, blank: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Rows in their slots: key -> (slots, …), and `slots` bool (slots,): which are taken.

    Args:
      rows: at most so many, each with the keys, shapes and dtypes of `blank`.
      slots: how many there are.
      blank: what stands in an empty slot, by key.

    Raises:
      ValueError: more rows than slots, or of another shape, or fractions for a slot of whole numbers.
    """
    if len(rows) > slots:
        raise ValueError(f"{len(rows)} rows for {slots} slots")
    out = {key: np.repeat(np.asarray(value)[None], slots, axis=0) for key, value in blank.items()}
    for i, row in enumerate(rows):
        for key, filled in out.items():
            value = np.asarray(row[key])
            if value.shape != filled.shape[1:]:
                raise ValueError(f"{key!r} of shape {value.shape} in a slot of {filled.shape[1:]}")
            if not np.can_cast(value.dtype, filled.dtype, "same_kind"):
                raise ValueError(f"{key!r} of {value.dtype} in a slot of {filled.dtype}")
            filled[i] = value
    return out | {"slots": np.arange(slots) < len(rows)}
