"""Non-maximum suppression on the device: what the greedy loop keeps, exactly, with static shapes.

Boxes are sorted by score and taken a tile at a time. What boxes of earlier tiles leave of a tile settles among itself:
box j stays if no box before it that stays overlaps it. That has one solution, and asking again until nothing changes
finds it, after at most as many rounds as there are boxes in a tile and mostly after a few.

Letters: B images, K boxes of an image, T boxes of a tile, M boxes that are kept at most.
"""

import functools

import jax
import jax.numpy as jnp

from capvl.nn.anchors import iou

TILE = 256


@functools.partial(jax.jit, static_argnames=("most", "tile"))
def suppress(
    boxes_BK4, scores_BK, labels_BK, valid_BK, *, overlap: float = 0.6, most: int | None = None, tile: int = TILE
) -> tuple[jax.Array, jax.Array]:
    """The `most` best boxes of each image that no better box of the same label covers.

    A box is left out if one of higher score (of equal scores: one before it) that is kept has its label, and an IoU
    with it of strictly more than `overlap`. Labels are compared, boxes not moved apart by them: no precision is lost.

    Args:
      boxes_BK4: pixels with inclusive ends, float32.
      scores_BK: float32.
      labels_BK: int32; all equal: classes don't matter.
      valid_BK: bool; rows that are False are never kept and cover nothing, whatever is in them.
      most: M; by default all.
      tile: boxes that settle together.

    Returns:
      Numbers of the kept boxes by falling score, int32 (B, M), and which of them there are, bool (B, M), the first.
    """
    batch, count = scores_BK.shape
    most = count if most is None else most
    number_BK = jax.lax.broadcasted_iota(jnp.int32, scores_BK.shape, 1)
    *_, order_BK = jax.lax.sort((~valid_BK, -scores_BK, number_BK), dimension=1, is_stable=True, num_keys=2)
    tile = max(1, min(tile, count))
    padding = -count % tile

    def sorted_(x):
        index = order_BK.reshape(batch, count, *(1,) * (x.ndim - 2))
        return jnp.pad(jnp.take_along_axis(x, index, axis=1), ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))

    kept_BK = _greedy(sorted_(boxes_BK4), sorted_(labels_BK), sorted_(valid_BK), overlap, most, tile)[:, :count]
    place_BK = jnp.where(kept_BK, jnp.cumsum(kept_BK, axis=1, dtype=jnp.int32) - 1, most)
    row_B1 = jnp.arange(batch)[:, None]
    found_BM = jnp.zeros((batch, most), jnp.int32).at[row_B1, place_BK].set(order_BK, mode="drop")
    return found_BM, jnp.arange(most)[None] < kept_BK.sum(axis=1, keepdims=True)


def _greedy(boxes_BK4, labels_BK, valid_BK, overlap, most, tile):
    """Which of sorted boxes are kept, bool (B, K); none behind the tile in which all images have `most`."""
    tiles = -(-valid_BK.sum(axis=1).max() // tile)

    def part(x, i):
        return jax.lax.dynamic_slice_in_dim(x, i * tile, tile, axis=1)

    def covers(i, j):
        """Which boxes of tile i cover which of tile j, bool (B, T, T)."""
        same_BTT = part(labels_BK, i)[:, :, None] == part(labels_BK, j)[:, None]
        return same_BTT & (iou(part(boxes_BK4, i)[:, :, None], part(boxes_BK4, j)[:, None]) > overlap)

    def unfinished(state):
        i, kept_BK = state
        return (i < tiles) & (kept_BK.sum(axis=1) < most).any()

    def body(state):
        i, kept_BK = state

        def earlier(j, free_BT):
            return free_BT & ~(covers(j, i) & part(kept_BK, j)[:, :, None]).any(axis=1)

        free_BT = jax.lax.fori_loop(0, i, earlier, part(valid_BK, i))
        before_TT = jnp.arange(tile)[:, None] < jnp.arange(tile)[None]
        kept_BT = _settle(covers(i, i) & before_TT[None], free_BT)
        return i + 1, jax.lax.dynamic_update_slice_in_dim(kept_BK, kept_BT, i * tile, axis=1)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), jnp.zeros_like(valid_BK)))[1]


def _settle(covers_BTT, free_BT):
    """The solution of kept_j = free_j and no i with kept_i covers j, where only i < j cover j."""

    def again(state):
        kept_BT, _ = state
        new_BT = free_BT & ~(covers_BTT & kept_BT[:, :, None]).any(axis=1)
        return new_BT, (new_BT != kept_BT).any()

    return jax.lax.while_loop(lambda state: state[1], again, (free_BT, jnp.bool_(True)))[0]
