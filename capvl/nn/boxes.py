"""Boxes as arrays: fractions of the image, as corners (x0, y0, x1, y1) or as (x, y of the centre, width, height)."""

import jax.numpy as jnp

_LEAST_AREA = 1e-9
"""What stands for an area of 0, so that no gradient is 0 / 0."""


def corners(box):
    """(x, y of the centre, width, height) (…, 4) -> (x0, y0, x1, y1)."""
    centre, half = box[..., :2], box[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def centres(box):
    """(x0, y0, x1, y1) (…, 4) -> (x, y of the centre, width, height)."""
    low, high = box[..., :2], box[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def area(box):
    """Areas (…) of corners (…, 4); 0 where the corners are the wrong way round."""
    return jnp.prod(jnp.maximum(box[..., 2:] - box[..., :2], 0.0), axis=-1)


def iou_and_giou(a, b):
    """IoU and generalised IoU (arXiv 1902.09630) of corners (…, 4), which broadcast.

    GIoU = I / U - (C - U) / C with intersection I, union U, and the area C of the smallest box that holds both. Boxes
    without area give 0, never NaN.
    """
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    inner = jnp.prod(jnp.maximum(high - low, 0.0), axis=-1)
    union = area(a) + area(b) - inner
    hull = jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1)
    outer = area(hull)
    iou = inner / jnp.maximum(union, _LEAST_AREA)
    return iou, iou - (outer - union) / jnp.maximum(outer, _LEAST_AREA)
