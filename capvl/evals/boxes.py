"""How well boxes are found, and how well they are found without looking. Boxes are (x0, y0, x1, y1)."""

from collections.abc import Sequence

import numpy as np

from capvl.data.images.geometry import Size

RIGHT = 0.5
"""The least IoU of a box that counts as found."""
DRAWS = 1_000
MOST = 2_000
"""Boxes of the training set that stand for all of them, in `chances`."""
CENTRE = (0.25, 0.25, 0.75, 0.75)


def ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union (…) of boxes (…, 4), which broadcast; 0 where there is no union."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inner = np.maximum(sides, 0).prod(axis=-1)
    union = _areas(a) + _areas(b) - inner
    return np.where(union > 0, inner / np.where(union > 0, union, 1), 0.0)


def pixel_ious(a: np.ndarray, b: np.ndarray, size: Size | np.ndarray) -> np.ndarray:
    """As `ious`, by RefCOCO's code, for boxes in fractions: a box of w pixels from x on ends with pixel x + w - 1, so
    that an overlap of one pixel or less, across or along, is none.

    Args:
      a, b: (…, 4).
      size: (height, width) of the image, or (…, 2) of each box's.
    """
    sides = np.asarray(size, np.float64)[..., [1, 0, 1, 0]]
    a, b = a * sides, b * sides
    overlap = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.where((overlap > 1).all(axis=-1), ious(a, b), 0.0)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(axis=-1)


def mean_box(boxes: np.ndarray) -> np.ndarray:
    """The box of the mean size at the mean place of boxes (N, 4)."""
    return boxes.mean(axis=0)


def chances(true: list[np.ndarray], drawn: np.ndarray) -> np.ndarray:
    """How often a random one of `drawn` (M, 4) is right, for each of the lists (T, 4) of boxes of which any is: (N,).
    Exact but for that every k-th of more than MOST stands for all."""
    drawn = drawn[:: -(-len(drawn) // MOST)]
    return np.array([(ious(drawn[:, None], own[None]).max(axis=1) >= RIGHT).mean() for own in true])


def interval(values: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values (N,): DRAWS times as many groups are drawn as there are, with
    replacement, and all values of each; the phrases of an image are one group (N,), as they are not independent."""
    _, place = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(DRAWS, len(sums)))
    low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (2.5, 97.5))
    return float(low), float(high)


def to_show(images: Sequence[int], count: int) -> list[int]:
    """Numbers of so many phrases for people to look at, of as many images as can be.

    Args:
      images: the image of each phrase.
      count: phrases at most.
    """
    first: dict[int, int] = {}
    for number, image in enumerate(images):
        first.setdefault(int(image), number)
    others = [number for number in range(len(images)) if number not in set(first.values())]
    return sorted([*first.values(), *others][:count])
