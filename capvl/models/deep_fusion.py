"""Deep fusion of an image's feature maps and a text's states (GLIP, arXiv 2112.03857, §3.2, eq. 4-6).

X-MHA: O' = LN(O) of the places of all levels side by side, P' = LN(P) of the tokens, and with one matrix of logits

    A = O' W_q (P' W_k)ᵀ / sqrt(K),   O <- O' + γ softmax_tokens(A) (P' W) W,   P <- P' + γ softmax_places(Aᵀ) (O' W) W

The paper adds to O and P; the weights that are published were trained with the sum beginning at the normalised ones.

Letters beside those of `capvl.nn.weights`: C width of the maps; N places of all levels, row by row, the finest first.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.models.bert import BertBlock, split_key
from capvl.models.sizes import Size
from capvl.nn import weights
from capvl.nn.attention import attend_with_dropout
from capvl.nn.bidirectional import attend_both_ways
from capvl.nn.layers import Dense, LayerNorm, as_row
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain

LIMIT = 50_000.0
"""Logits, and what the layer on texts gives, are clipped to ±LIMIT: the published weights were trained in 16 bits."""

EPS = 1e-5
"""Of the norms before a fusion."""

KINDS = ("both", "separate", "to_image", "none")


def side_by_side(maps: Sequence[jax.Array]) -> jax.Array:
    """Places (B, N, C) of maps (B, Y, X, C)."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps], axis=1)


def apart(places_BNC: jax.Array, maps: Sequence[jax.Array]) -> list[jax.Array]:
    """Maps (B, Y, X, C) as large as the given ones, of places side by side."""
    parts, first = [], 0
    for x in maps:
        size = x.shape[1] * x.shape[2]
        part = jax.lax.slice_in_dim(places_BNC, first, first + size, axis=1)
        parts.append(part.reshape(*x.shape[:3], -1))
        first += size
    return parts


def _into_heads(width: int, parts: int, heads: int, fusion_width: int, rngs: nnx.Rngs) -> Dense:
    """`parts` projections of features to heads (parts, H, K), fused."""
    shape = (parts, heads, fusion_width // heads)
    init = weights.xavier_uniform(width, fusion_width)
    return Dense((width, *shape), ("embed", None, "heads", None), init, bias=shape, rngs=rngs)


def _out_of_heads(width: int, heads: int, fusion_width: int, rngs: nnx.Rngs) -> Dense:
    """Projection of heads (H, K) to features."""
    shape = (heads, fusion_width // heads, width)
    init = weights.xavier_uniform(fusion_width, width)
    return Dense(shape, ("heads", None, "embed"), init, contract=2, bias=(width,), rngs=rngs)


def _added(x: jax.Array, gate: nnx.Param, change: jax.Array) -> jax.Array:
    """x + gate * change with a gate for each channel."""
    return constrain(x + as_row(gate[...].astype(x.dtype), x) * change, "batch", None, None)


class DeepFusion(nnx.Module):
    """X-MHA of maps and text states: both directions of attention at once.

    Args:
      width, text_width: C of the maps, D of the text.
      fusion_width, heads: of the attention; K = fusion_width / heads.
      gate: initial value of the layer scales γ; 1 / number of fusions in the paper's code.
      separate: number of levels that are fused with the text one by one, with shared weights, where the tokens' results
        are joined by a Dense and a norm; 0: all levels at once.
      dropout: in training, of attention weights.
    """

    def __init__(
        self,
        width: int,
        text_width: int,
        fusion_width: int,
        heads: int,
        *,
        gate: float,
        separate: int = 0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        self.norm_image = LayerNorm(width, eps=EPS, rngs=rngs)
        self.norm_text = LayerNorm(text_width, eps=EPS, rngs=rngs)
        self.image_qv = _into_heads(width, 2, heads, fusion_width, rngs)
        self.text_kv = _into_heads(text_width, 2, heads, fusion_width, rngs)
        self.image_out = _out_of_heads(width, heads, fusion_width, rngs)
        self.text_out = _out_of_heads(text_width, heads, fusion_width, rngs)
        self.image_gate = weight(rngs, (width,), (None,), weights.constant(gate))
        self.text_gate = weight(rngs, (text_width,), (None,), weights.constant(gate))
        shape = (separate * text_width, text_width)
        init = weights.xavier_uniform(*shape)
        self.join = Dense(shape, (None, "embed"), init, bias=(text_width,), rngs=rngs) if separate else None
        self.join_norm = LayerNorm(text_width, eps=1e-12, rngs=rngs) if separate else None

    def __call__(
        self, maps: Sequence[jax.Array], states_BLD, mask_BL, key: jax.Array | None = None
    ) -> tuple[list[jax.Array], jax.Array]:
        """Fuses levels and text.

        Args:
          maps: (B, Y, X, C) of each level.
          states_BLD: text states.
          mask_BL: which of them are tokens, bool.
          key: means training.

        Returns:
          Maps and states of the same shapes.
        """
        if self.join is None:
            places_BNC, states_BLD = self.fused(side_by_side(maps), states_BLD, mask_BL, key)
            return apart(places_BNC, maps), states_BLD
        results = [
            self.fused(side_by_side([x]), states_BLD, mask_BL, level_key)
            for x, level_key in zip(maps, split_key(key, len(maps)), strict=True)
        ]
        joined_BLD = self.join_norm(self.join(jnp.concatenate([states for _, states in results], axis=-1)))
        return [apart(places, [x])[0] for (places, _), x in zip(results, maps, strict=True)], joined_BLD

    def fused(self, places_BNC, states_BLD, mask_BL, key=None) -> tuple[jax.Array, jax.Array]:
        """X-MHA of places and tokens."""
        places_BNC, states_BLD = self.norm_image(places_BNC), self.norm_text(states_BLD)
        change_BNC, change_BLD = self.changes(places_BNC, states_BLD, mask_BL, key)
        return _added(places_BNC, self.image_gate, change_BNC), _added(states_BLD, self.text_gate, change_BLD)

    def changes(self, places_BNC, states_BLD, mask_BL, key=None) -> tuple[jax.Array, jax.Array]:
        """What normalised places and tokens give each other, before the layer scales."""
        qv_BNcHK, kv_BLcHK = self.image_qv(places_BNC), self.text_kv(states_BLD)
        q, image, k, text = qv_BNcHK[:, :, 0], qv_BNcHK[:, :, 1], kv_BLcHK[:, :, 0], kv_BLcHK[:, :, 1]
        mixed = attend_both_ways(q, k, image, text, mask_BL, key, self.dropout, LIMIT)
        return self.image_out(mixed.places), self.text_out(mixed.tokens)


class FusionToImage(nnx.Module):
    """Attention from places to tokens alone, level by level; the text stays as it is.

    As in the code that the weights come from, the text is normalised again at each further level. Arguments as for
    `DeepFusion`.
    """

    def __init__(
        self,
        width: int,
        text_width: int,
        fusion_width: int,
        heads: int,
        *,
        gate: float,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        self.norm_image = LayerNorm(width, eps=EPS, rngs=rngs)
        self.norm_text = LayerNorm(text_width, eps=EPS, rngs=rngs)
        self.image_q = _into_heads(width, 1, heads, fusion_width, rngs)
        self.text_kv = _into_heads(text_width, 2, heads, fusion_width, rngs)
        self.image_out = _out_of_heads(width, heads, fusion_width, rngs)
        self.image_gate = weight(rngs, (width,), (None,), weights.constant(gate))

    def __call__(
        self, maps: Sequence[jax.Array], states_BLD, mask_BL, key: jax.Array | None = None
    ) -> tuple[list[jax.Array], jax.Array]:
        """As `DeepFusion`; the states come back unchanged."""
        fused, text_BLD = [], states_BLD
        for x, level_key in zip(maps, split_key(key, len(maps)), strict=True):
            text_BLD = self.norm_text(text_BLD)
            places_BNC = self.norm_image(side_by_side([x]))
            q_BNHK, kv_BLcHK = self.image_q(places_BNC)[:, :, 0], self.text_kv(text_BLD)
            how = dict(mask=mask_BL[:, None, None], dropout=self.dropout, key=level_key, limit=LIMIT)
            mixed_BNHK = attend_with_dropout(q_BNHK, kv_BLcHK[:, :, 0], kv_BLcHK[:, :, 1], **how)
            fused += apart(_added(places_BNC, self.image_gate, self.image_out(mixed_BNHK)), [x])
        return fused, states_BLD


class TowerBertLayer(BertBlock):
    """The BERT layer on the text after each fusion, new with the tower."""

    def __init__(self, size: Size, *, dropout: float = 0.0, rngs: nnx.Rngs):
        super().__init__(size, rngs, dropout=dropout, limit=LIMIT)
