"""What an image encoder gives: levels, each a grid of tokens; and the features of regions of such a grid.

A ViT has one level; hierarchical encoders (Swin, feature pyramids) have several, whose strides double.

Letters: B images, H and W pixels, N tokens, P places of a grid row by row, R boxes of an image, D width; Q groups of
G images each, and S regions of a group.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    """Images, and regions of them that are encoded as X-VLM has them (arXiv 2111.08276, section 3.1).

    Attributes:
      whole: the images' level, whose prefix is a summary ([CLS]).
      tokens_RND: of each of the Q S regions, one group after another: its summary, then a token of each place of its
        whole image.
      inside_RN: which of them are the region's, bool; True for the summary.
    """

    whole: Level
    tokens_RND: jax.Array
    inside_RN: jax.Array


def with_summary(level: Level) -> Level:
    """The level with a summary of the image as its prefix: the class token, or where it has none the mean of the
    tokens that aren't padding."""
    if level.prefix:
        return level
    mean = mean_of_tokens(level)[:, None]
    valid = level.valid_BN
    if valid is not None:
        valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
    tokens = jnp.concatenate([mean, level.tokens_BND], axis=1)
    return dataclasses.replace(level, tokens_BND=tokens, prefix=1, valid_BN=valid)


def mean_of_tokens(level: Level) -> jax.Array:
    """Mean (B, D) of the tokens of places that aren't padding, summed in float32."""
    places = level.tokens_BND[:, level.prefix :]
    inside = jnp.ones(places.shape[:2], bool) if level.valid_BN is None else level.valid_BN[:, level.prefix :]
    return pool_regions(places, inside[:, None])[:, 0]


def of_owners(rows_B, owner_QS) -> jax.Array:
    """Rows (B, …) of images for the regions of them, (Q S, …): a product with ones and zeros, which is exact, divides
    over devices by groups, and is as fast backward.

    Args:
      rows_B: float rows; images of a group stand together.
      owner_QS: int32 number of each region's image in its group, 0 to B / Q - 1.
    """
    groups, regions = owner_QS.shape
    per_group = len(rows_B) // groups
    chosen_QSG = jax.nn.one_hot(owner_QS, per_group, dtype=rows_B.dtype)
    flat_QGX = rows_B.reshape(groups, per_group, -1)
    return jnp.einsum("qsg,qgx->qsx", chosen_QSG, flat_QGX).reshape(groups * regions, *rows_B.shape[1:])


def pooled_regions(level: Level, box_QS4, owner_QS) -> Regions:
    """Regions whose tokens are their image's and whose summary is the mean of those inside (X-VLM on Swin).

    Args:
      level: of the images.
      box_QS4: boxes of the regions (`Level.in_boxes`).
      owner_QS: whose they are (`of_owners`).
    """
    whole = with_summary(level)
    inside_RN = inside_of(whole, box_QS4, owner_QS)
    tokens_RND = of_owners(whole.tokens_BND, owner_QS)
    summary_R1D = pool_regions(tokens_RND[:, 1:], inside_RN[:, None, 1:])
    return Regions(whole, jnp.concatenate([summary_R1D, tokens_RND[:, 1:]], axis=1), inside_RN)


def inside_of(whole: Level, box_QS4, owner_QS) -> jax.Array:
    """Which tokens of its image each region has, bool (Q S, N): the prefix always, none of the padding."""
    inside_RP = places_in_boxes(box_QS4.reshape(-1, 1, 4), whole.grid)[:, 0]
    if whole.place_BP is not None:
        place_RP = of_owners(whole.place_BP.astype(jnp.float32), owner_QS).astype(jnp.int32)
        inside_RP = jnp.take_along_axis(inside_RP, place_RP, axis=1)
    inside_RN = jnp.pad(inside_RP, ((0, 0), (whole.prefix, 0)), constant_values=True)
    if whole.valid_BN is None:
        return inside_RN
    return inside_RN & (of_owners(whole.valid_BN.astype(jnp.float32), owner_QS) > 0)
