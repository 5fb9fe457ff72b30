"""What an image encoder gives: levels, each a grid of tokens; and the features of regions of such a grid.

A ViT has one level; hierarchical encoders (Swin, feature pyramids) have several, whose strides double.

Letters: B images, H and W pixels, N tokens, P places of a grid row by row, R boxes of an image, D width. Regions that
are the rows of a batch: Q groups of S images, R rows of a group or, where no Q is before it, of all.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from capvl.parallel.rules import constrain

# By how much of a place a box may miss a border for the rounding of its fractions alone.
_ROUNDING = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
    """Tokens of one resolution.

    Attributes:
      tokens_BND: `prefix` tokens that belong to no place (a class token), then one of each place of the grid, row by
        row, unless `place` says otherwise.
      grid: rows and columns.
      stride: pixels from one place to the next.
      prefix: tokens before the places.
      valid_BN: which tokens are of the image rather than of its padding, bool; None for all.
      place_BP: int32 place of each token behind the prefix, where some were left out or moved; None for all in order.
    """

    tokens_BND: jax.Array
    grid: tuple[int, int] = dataclasses.field(metadata={"static": True})
    stride: int = dataclasses.field(metadata={"static": True})
    prefix: int = dataclasses.field(default=0, metadata={"static": True})
    valid_BN: jax.Array | None = None
    place_BP: jax.Array | None = None

    def map(self) -> jax.Array:
        """The tokens where they belong, (B, rows, columns, D); zeros where none is, or only padding."""
        tokens_BPD = self.tokens_BND[:, self.prefix :]
        if self.valid_BN is not None:
            tokens_BPD = jnp.where(self.valid_BN[:, self.prefix :, None], tokens_BPD, jnp.zeros((), tokens_BPD.dtype))
        batch, _, width = tokens_BPD.shape
        if self.place_BP is not None:
            empty_BPD = jnp.zeros((batch, self.grid[0] * self.grid[1], width), tokens_BPD.dtype)
            tokens_BPD = empty_BPD.at[jnp.arange(batch)[:, None], self.place_BP].set(tokens_BPD)
        return tokens_BPD.reshape(batch, *self.grid, width)

    def in_boxes(self, box_BR4) -> jax.Array:
        """Which tokens lie in boxes (see `places_in_boxes`), bool (B, R, N): none of the prefix or of padding."""
        inside_BRN = places_in_boxes(box_BR4, self.grid)
        if self.place_BP is not None:
            inside_BRN = jnp.take_along_axis(inside_BRN, self.place_BP[:, None], axis=2)
        inside_BRN = jnp.pad(inside_BRN, ((0, 0), (0, 0), (self.prefix, 0)))
        return inside_BRN if self.valid_BN is None else inside_BRN & self.valid_BN[:, None]


def places_in_boxes(box_BR4, grid: tuple[int, int]) -> jax.Array:
    """Which places of a grid boxes touch, by X-VLM's rule (arXiv 2111.08276, official code).

    Columns floor(x0) to ceil(x1) - 1 in units of places, rows likewise, cut to the grid; at least one place.

    Args:
      box_BR4: (x0, y0, x1, y1) float32 in fractions of the grid's extent, which is the image with its padding.
      grid: rows and columns.

    Returns:
      bool (B, R, rows * columns).
    """
    inside = []
    for low, high, count in ((box_BR4[..., 1], box_BR4[..., 3], grid[0]), (box_BR4[..., 0], box_BR4[..., 2], grid[1])):
        first_BR1 = jnp.clip(jnp.floor(low * count + _ROUNDING), 0, count - 1)[..., None]
        last_BR1 = jnp.maximum(first_BR1 + 1, jnp.ceil(high * count - _ROUNDING)[..., None])
        place_11P = jnp.arange(count, dtype=jnp.float32)[None, None]
        inside.append((place_11P >= first_BR1) & (place_11P < last_BR1))
    rows_BRP, columns_BRP = inside
    both = rows_BRP[..., :, None] & columns_BRP[..., None, :]
    return both.reshape(*both.shape[:2], grid[0] * grid[1])


def pool_regions(tokens_BND, inside_BRN) -> jax.Array:
    """Mean of each region's tokens, (B, R, D), summed in float32; 0 where it has none.

    Args:
      tokens_BND: of a `Level`.
      inside_BRN: which of them each region has, such as `Level.in_boxes` gives.
    """
    # The sum is divided, not the weights: 1 / n is not exact in bfloat16.
    total_BRD = jnp.einsum(
        "brn,bnd->brd", inside_BRN.astype(tokens_BND.dtype), tokens_BND, preferred_element_type=jnp.float32
    )
    count_BR1 = inside_BRN.sum(axis=-1, keepdims=True).astype(jnp.float32)
    return (total_BRD / jnp.maximum(count_BR1, 1.0)).astype(tokens_BND.dtype)


class Regions(NamedTuple):
    """Images, and regions of them as rows of a batch.

    Attributes:
      whole: the images, with one token before their places (`with_summary`).
      tokens_RND: of each region, as many as its image has: the first is of the region, what is outside is to be hidden.
      inside_RN: which of them are of the region, bool; the first always.
    """

    whole: Level
    tokens_RND: jax.Array
    inside_RN: jax.Array


def with_summary(level: Level) -> Level:
    """The level with one token before its places: its class token or, where it has none, the mean of its tokens."""
    if level.prefix:
        return level
    valid_BN = level.valid_BN
    if valid_BN is None:
        mean_B1D = level.tokens_BND.mean(axis=1, keepdims=True)
    else:
        mean_B1D = pool_regions(level.tokens_BND, valid_BN[:, None])
        valid_BN = jnp.pad(valid_BN, ((0, 0), (1, 0)), constant_values=True)
    tokens_BND = jnp.concatenate([mean_B1D, level.tokens_BND], axis=1)
    return dataclasses.replace(level, tokens_BND=tokens_BND, prefix=1, valid_BN=valid_BN)


def rows_of(x_B, owner_QR) -> jax.Array:
    """What belongs to the image of each row: (B, …) -> (Q R, …).

    By a matmul with ones and zeros within each group: nothing moves between devices where each has whole groups.

    Args:
      x_B: of Q groups of B / Q images, one after the other; floating point.
      owner_QR: the image of each row, by its place in the group, int32.
    """
    groups, rows = owner_QR.shape
    grouped = constrain(x_B.reshape(groups, -1, *x_B.shape[1:]), "groups", *(None,) * x_B.ndim)
    chosen_QRS = jax.nn.one_hot(owner_QR, grouped.shape[1], dtype=x_B.dtype)
    # Exact: all but one of what is added is 0.
    of_rows = jnp.einsum("qrs,qs...->qr...", chosen_QRS, grouped, precision="highest")
    return constrain(of_rows.reshape(groups * rows, *x_B.shape[1:]), "batch", *(None,) * (x_B.ndim - 1))


def inside_of_rows(level: Level, box_QR4, owner_QR) -> jax.Array:
    """Which tokens behind the prefix lie in the box of each row, bool (Q R, P); see `places_in_boxes`."""
    inside_RP = places_in_boxes(box_QR4, level.grid).reshape(-1, level.grid[0] * level.grid[1])
    if level.place_BP is not None:
        place_RP = rows_of(level.place_BP.astype(jnp.float32), owner_QR).astype(jnp.int32)
        inside_RP = jnp.take_along_axis(inside_RP, place_RP, axis=1)
    if level.valid_BN is not None:
        inside_RP &= rows_of(level.valid_BN[:, level.prefix :].astype(jnp.float32), owner_QR) > 0.5
    return inside_RP


def regions_of(level: Level, box_QR4, owner_QR, tokens_RND=None) -> Regions:
    """Regions of encoded images: see `capvl.models.vit.ViT.regions`.

    Args:
      level: of the images.
      box_QR4, owner_QR: rows of each group.
      tokens_RND: of the rows, where they were encoded by themselves; else they are those of their images. Without a
        prefix, or where they are the images', the mean of those inside goes before them.
    """
    inside_RP = inside_of_rows(level, box_QR4, owner_QR)
    if tokens_RND is None:
        tokens_RND, prefix = rows_of(level.tokens_BND[:, level.prefix :], owner_QR), 0
    else:
        prefix = level.prefix
    if not prefix:
        tokens_RND = jnp.concatenate([pool_regions(tokens_RND, inside_RP[:, None]), tokens_RND], axis=1)
    inside_RN = jnp.pad(inside_RP, ((0, 0), (1, 0)), constant_values=True)
    return Regions(with_summary(level), tokens_RND, inside_RN)
