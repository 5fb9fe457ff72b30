"""Anchors: a square at each place of a pyramid, and boxes as seen from it (ATSS, arXiv 1912.02424; GLIP, 2112.03857).

Elsewhere boxes are fractions of the image. Here they are (x0, y0, x1, y1) in pixels whose ends are inclusive, as in
GLIP's code: a box of one pixel has x0 = x1, and its width is x1 - x0 + 1.

Letters: N places of all levels, level by level (the finest first) and row by row.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

STRIDES = (8, 16, 32, 64, 128)
"""Pixels from one place to the next, of the levels P3 to P7; one of stride s has ⌈side / s⌉ rows or columns."""

_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
_MOST_GROWTH = math.log(1000 / 16)
_LEAST_SIDE = 1e-3
"""What stands for the side of an empty box, which has no logarithm."""


def anchors(
    grids: Sequence[tuple[int, int]],
    strides: Sequence[int] = STRIDES,
    scale: float = 8,
    *,
    ratios: Sequence[float] = (1.0,),
    octaves: Sequence[float] = (1.0,),
) -> np.ndarray:
    """The anchors of all places, float32 (N * A, 4), those of a place together, ratio by ratio.

    Args:
      grids: rows and columns of each level.
      strides: of each level.
      scale: the side of an anchor in strides.
      ratios: of height to width; A is their number times that of the octaves.
      octaves: factors of the scale.

    Raises:
      ValueError: there are not as many strides as grids.
    """
    levels = []
    for (rows, columns), stride in zip(grids, strides, strict=True):
        # The sides of the cell's own box are whole pixels before it is scaled.
        width = np.round(np.sqrt(stride * stride / np.asarray(ratios, np.float64)))
        height = np.round(width * ratios)
        side_A2 = np.stack([width, height], axis=1)[:, None] * (np.asarray(octaves, np.float64) * scale)[None, :, None]
        half_A2 = (side_A2.reshape(-1, 2) - 1) / 2
        cell_A4 = np.concatenate([-half_A2, half_A2], axis=1) + (stride - 1) / 2
        y_YX, x_YX = np.meshgrid(np.arange(rows) * stride, np.arange(columns) * stride, indexing="ij")
        shift_N4 = np.stack([x_YX, y_YX, x_YX, y_YX], axis=-1).reshape(-1, 4)
        levels.append((shift_N4[:, None] + cell_A4[None]).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def in_image(anchors_N4, size: tuple[int, int], straddle: float = 0.0):
    """Which anchors lie in an image of (height, width), or reach over its border by `straddle` pixels at most; (N,)."""
    height, width = size
    low, high = (anchors_N4[:, :2] >= -straddle).all(axis=1), anchors_N4[:, 2:]
    return low & (high[:, 0] < width + straddle) & (high[:, 1] < height + straddle)


def inclusive(boxes, size: tuple[int, int]):
    """Boxes (…, 4) from fractions of an image of (height, width) to pixels with inclusive ends."""
    height, width = size
    scaled = boxes * _as_wide(boxes, (width, height, width, height))
    return scaled - _as_wide(boxes, (0, 0, 1, 1))


def fractions(boxes, size: tuple[int, int]):
    """Boxes (…, 4) from pixels with inclusive ends to fractions of an image of (height, width)."""
    height, width = size
    ends = boxes + _as_wide(boxes, (0, 0, 1, 1))
    return ends / _as_wide(boxes, (width, height, width, height))


def _as_wide(boxes, values):
    return jnp.asarray(values, jnp.float32).reshape((1,) * (boxes.ndim - 1) + (4,))


def clip(boxes_BK4, sizes_B2):
    """Boxes with their corners moved to the pixels of images of (height, width); none is left out."""
    last_B12 = (sizes_B2.astype(jnp.float32) - 1.0)[:, None, ::-1]
    return jnp.clip(boxes_BK4, 0.0, jnp.concatenate([last_B12, last_B12], axis=-1))


def area(boxes):
    """Pixels in boxes (…, 4); 0 where the corners are the wrong way round."""
    side = jnp.maximum(boxes[..., 2:] - boxes[..., :2] + 1.0, 0.0)
    return side[..., 0] * side[..., 1]


def iou(a, b):
    """Intersection over union of boxes (…, 4), which broadcast; 0 where both are empty."""
    wide = jnp.minimum(a[..., 2], b[..., 2]) - jnp.maximum(a[..., 0], b[..., 0]) + 1.0
    high = jnp.minimum(a[..., 3], b[..., 3]) - jnp.maximum(a[..., 1], b[..., 1]) + 1.0
    inner = jnp.maximum(wide, 0.0) * jnp.maximum(high, 0.0)
    union = area(a) + area(b) - inner
    return inner / jnp.where(union > 0, union, 1.0)


def encode(boxes, anchors):
    """Boxes (…, 4) as seen from anchors, which broadcast: 10 * shift / side, 5 * log(side / side), float32 (…, 4).

    The coder of Faster R-CNN (arXiv 1506.01497, equation 2), with the weights of GLIP's code.
    """
    side, middle = _side(boxes), _middle(boxes)
    anchor_side = _side(anchors)
    shift = (middle - _middle(anchors)) / anchor_side
    growth = jnp.log(jnp.maximum(side, _LEAST_SIDE) / anchor_side)
    deltas = jnp.concatenate([shift, growth], axis=-1)
    return deltas * _as_wide(deltas, _WEIGHTS)


def decode(deltas, anchors):
    """The boxes (…, 4) that `encode` turned into deltas (…, 4); sides grow to 1000 / 16 of the anchor's at most."""
    deltas = deltas / _as_wide(deltas, _WEIGHTS)
    anchor_side = _side(anchors)
    middle = deltas[..., :2] * anchor_side + _middle(anchors)
    half = (jnp.exp(jnp.minimum(deltas[..., 2:], _MOST_GROWTH)) * anchor_side - 1.0) / 2
    return jnp.concatenate([middle - half, middle + half], axis=-1)


def _side(boxes):
    return boxes[..., 2:] - boxes[..., :2] + 1.0


def _middle(boxes):
    return (boxes[..., :2] + boxes[..., 2:]) / 2
