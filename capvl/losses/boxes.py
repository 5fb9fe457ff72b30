"""Losses of boxes: L1 and generalised IoU, as in DETR (arXiv 2005.12872) and X-VLM (2111.08276, section 3.2)."""

import jax
import jax.numpy as jnp

from capvl.nn.boxes import corners, iou_and_giou


def box_losses(found_R4, true_R4, weight_R) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Means over rows of the sum of |difference| over four coordinates, of 1 - GIoU, and of the IoU.

    Args:
      found_R4, true_R4: (x, y of the centre, width, height), float32 fractions.
      weight_R: float32 of each row; where all are 0, all three are 0.

    Returns:
      float32 scalars (L1, GIoU loss, IoU).
    """
    iou_R, giou_R = iou_and_giou(corners(found_R4), corners(true_R4))
    l1_R = jnp.abs(found_R4 - true_R4).sum(axis=-1)
    count = jnp.maximum(weight_R.sum(), 1.0)
    l1, giou, iou = ((weight_R * x).sum() / count for x in (l1_R, 1.0 - giou_R, iou_R))
    return l1, giou, iou
