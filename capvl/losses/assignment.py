"""Which box each place of a pyramid is trained on: ATSS (arXiv 1912.02424, algorithm 1), with static shapes.

Letters: B images, S slots of true boxes of an image, N places of all levels, C candidates of a box.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from capvl.losses import ring
from capvl.nn.anchors import iou

_LEAST_MARGIN = 0.01
"""Pixels that an anchor's centre is inside a box at least."""


def atss(anchors_N4, places: Sequence[int], boxes_BS4, slots_BS, *, nearest: int = 9) -> jax.Array:
    """The slot of the box that each anchor is assigned to, or -1; int32 (B, N).

    Candidates of a box are on each level the `nearest` anchors whose centres are nearest to its own, or all where there
    are fewer. One is positive where its IoU with the box is at least the mean plus the standard deviation (unbiased)
    of those of all candidates, and its centre is inside the box. Where several boxes claim an anchor, that of the
    largest IoU has it (the first of several). A box may get none, and so may an image.

    A device holds the distances of all places to all slots: float32, 9 MB an image of 22,000 places and 100 slots.

    Args:
      anchors_N4: inclusive pixels, float32 (`capvl.nn.anchors`).
      places: how many of the anchors belong to each level.
      boxes_BS4: inclusive pixels, float32.
      slots_BS: which slots hold a box, bool.

    Raises:
      ValueError: the levels don't make up the anchors.
    """
    if sum(places) != len(anchors_N4):
        raise ValueError(f"levels of {tuple(places)} places for {len(anchors_N4)} anchors")
    anchors_N4 = jnp.asarray(anchors_N4)

    def local(boxes_BS4, slots_BS):
        return jax.vmap(lambda boxes_S4, slots_S: _of_image(anchors_N4, places, boxes_S4, slots_S, nearest))(
            boxes_BS4, slots_BS
        )

    rows = ring.rows()
    return ring.mapped(local, (rows, rows), rows)(boxes_BS4, slots_BS)


def _of_image(anchors_N4, places, boxes_S4, slots_S, nearest):
    middle_N2, middle_S2 = ((x[:, :2] + x[:, 2:]) / 2 for x in (anchors_N4, boxes_S4))
    chosen_SC = _candidates(middle_N2, places, middle_S2, nearest)
    # Computed once: it is compared with itself below, and a compiler might compute it twice with other roundings.
    iou_SC = jax.lax.optimization_barrier(iou(anchors_N4[chosen_SC], boxes_S4[:, None]))
    mean_S1 = iou_SC.mean(axis=1, keepdims=True)
    spread_S1 = ((iou_SC - mean_S1) ** 2).sum(axis=1, keepdims=True) / max(iou_SC.shape[1] - 1, 1)
    middle_SC2 = middle_N2[chosen_SC]
    margin_SC = jnp.minimum(middle_SC2 - boxes_S4[:, None, :2], boxes_S4[:, None, 2:] - middle_SC2).min(axis=-1)
    positive_SC = (iou_SC >= mean_S1 + jnp.sqrt(spread_S1)) & (margin_SC > _LEAST_MARGIN) & slots_S[:, None]

    # Only candidates are written to: no (N, S) array of IoUs is made.
    best_N = jnp.full(len(anchors_N4), -1.0).at[chosen_SC].max(jnp.where(positive_SC, iou_SC, -1.0))
    none = len(boxes_S4)
    slot_SC = jax.lax.broadcasted_iota(jnp.int32, chosen_SC.shape, 0)
    slot_SC = jnp.where(positive_SC & (iou_SC == best_N[chosen_SC]), slot_SC, none)
    slot_N = jnp.full(len(anchors_N4), none, jnp.int32).at[chosen_SC].min(slot_SC)
    return jnp.where(slot_N < none, slot_N, -1)


def _candidates(middle_N2, places, middle_S2, nearest):
    """int32 (S, C) numbers of anchors."""
    found, first = [], 0
    for count in places:
        level_N2 = middle_N2[first : first + count]
        x_SN, y_SN = (middle_S2[:, None, i] - level_N2[None, :, i] for i in range(2))
        found.append(jax.lax.top_k(-jnp.sqrt(x_SN**2 + y_SN**2), min(nearest, count))[1] + first)
        first += count
    return jnp.concatenate(found, axis=1)
