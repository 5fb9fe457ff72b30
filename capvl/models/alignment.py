"""What a place of an image tells: its tokens, its box, its centerness (GLIP, arXiv 2112.03857, §3.1, eq. 3).

A place's logit of a token is their similarity, which takes the place of a detector's fixed list of classes.

Letters beside those of `capvl.nn.weights`: C width of the maps; N places of all levels, row by row, the finest first.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capvl.models.deep_fusion import LIMIT, side_by_side
from capvl.nn import weights
from capvl.nn.layers import Dense, as_row
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain

PRIOR = 0.01
"""Probability that an untrained model gives a place and a token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aligned:
    """What places tell, float32.

    Attributes:
      logits_BNL: how well each fits every token, padding among them.
      deltas_BN4: the box, as seen from the place's anchor (`capvl.nn.anchors`).
      centerness_BN: logit of how near the place is to the box's middle.
      grids: rows and columns of each level.
    """

    logits_BNL: jax.Array
    deltas_BN4: jax.Array
    centerness_BN: jax.Array
    grids: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})


class AlignmentHead(nnx.Module):
    """Maps of the last block and text states -> `Aligned`.

    With e = p / ‖p‖ of a token's state and x of a place,
    logit = clip(x · (W e / 2 + b) / exp(log_scale) + e · bias_text + bias, ±50000).

    Args:
      width, text_width: C of the maps, D of the text states.
      levels: how many maps; each has a factor of its own for its box deltas.
    """

    def __init__(self, width: int, text_width: int, levels: int, *, rngs: nnx.Rngs):
        small = weights.normal(0.01)
        self.project = Dense(
            (text_width, width), ("embed", None), weights.xavier_uniform(text_width, width), bias=(width,), rngs=rngs
        )
        self.log_scale = weight(rngs, (1,), (None,), weights.zeros)
        self.bias_text = weight(rngs, (text_width,), (None,), weights.zeros)
        self.bias = weight(rngs, (1,), (None,), weights.constant(-math.log((1 - PRIOR) / PRIOR)))
        self.box = Dense((width, 4), ("embed", None), small, bias=(4,), rngs=rngs)
        self.box_scale = weight(rngs, (levels,), (None,), weights.ones)
        self.centerness = Dense((width, 1), ("embed", None), small, bias=(1,), rngs=rngs)

    def __call__(self, maps: Sequence[jax.Array], states_BLD) -> Aligned:
        """maps: (B, Y, X, C) of each level; states: text states, or for a tower without fusion the text embeddings."""
        places_BNC = constrain(side_by_side(maps), "batch", None, None)
        # In float32: a delta is multiplied by its anchor's size, up to 1024 pixels.
        exact_BNC = places_BNC.astype(jnp.float32)
        sizes = np.asarray([x.shape[1] * x.shape[2] for x in maps])
        scale_N = jnp.repeat(self.box_scale[...], sizes, total_repeat_length=int(sizes.sum()))
        deltas_BN4 = self.box(exact_BNC) * scale_N[None, :, None]
        grids = tuple(x.shape[1:3] for x in maps)
        return Aligned(self.logits(places_BNC, states_BLD), deltas_BN4, self.centerness(exact_BNC)[..., 0], grids)

    def logits(self, places_BNC, states_BLD) -> jax.Array:
        """Logits (B, N, L) float32 of places and tokens."""
        queries_BLC, bias_BL = self.tokens(states_BLD)
        dots_BNL = jnp.einsum("bnc,blc->bnl", places_BNC, queries_BLC, preferred_element_type=jnp.float32)
        scaled_BNL = dots_BNL * jnp.exp(-self.log_scale[...].astype(jnp.float32)).reshape(1, 1, 1)
        return jnp.clip(scaled_BNL + bias_BL[:, None], -LIMIT, LIMIT)

    def tokens(self, states_BLD) -> tuple[jax.Array, jax.Array]:
        """What is compared with places: vectors (B, L, C) of tokens, and their biases (B, L) float32."""
        states = states_BLD.astype(jnp.float32)
        # Text embeddings of padding are 0, where the norm has no gradient.
        normal = states * jax.lax.rsqrt(jnp.maximum(jnp.square(states).sum(-1, keepdims=True), 1e-24))
        bias_BL = (normal * as_row(self.bias_text[...].astype(jnp.float32), normal)).sum(-1)
        return self.project((normal / 2).astype(states_BLD.dtype)), bias_BL + self.bias[...].astype(jnp.float32)[None]
