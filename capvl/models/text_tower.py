"""Text encoder of a two-tower model: the ViT's blocks over token embeddings (LiT, CLIP, SigLIP), or BERT's."""

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.models.bert import BertBlock
from capvl.models.sizes import Size
from capvl.models.vit import EncoderBlock, MapHead
from capvl.nn import weights
from capvl.nn.layers import Dense, LayerNorm
from capvl.nn.padding import real
from capvl.nn.stack import scan, stack
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain

POOLS = ("last", "mean", "map", "argmax", "eos", "first", "max")


class TextTower(nnx.Module):
    """Token ids (B, L) -> one vector a text.

    Args:
      size, vocab, length: width and depth, number of ids, text positions.
      out, out_bias: width of the projection behind the pooling, and whether it has a bias.
      pool: "last" (position), "mean" (of the tokens that aren't padding where `hide_padding`, else of
        all), "map", "argmax" (the position of the highest id, CLIP's end of text), "eos" (the first position
        of the id `end`; the first of all where there is none), "first", "max".
      norm: where layer norms stand: "pre" (before attention and MLP, and at the end) or "post" (BERT: behind the
        embeddings, and behind what attention and MLP are added to).
      causal: a token sees only itself and those before it.
      hide_padding: nobody sees padding (id 0).
      pad: id that the tower reads where the text has padding.
      activation, eps, remat, unroll: as in `capvl.models.vision.ImageOptions`.
    """

    def __init__(
        self,
        size: Size,
        vocab: int,
        length: int,
        out: int,
        *,
        out_bias: bool,
        pool: str,
        end: int = 0,
        norm: str = "pre",
        causal: bool,
        hide_padding: bool,
        pad: int,
        activation: str,
        eps: float,
        remat: str,
        unroll: bool,
        rngs: nnx.Rngs,
    ):
        self.vocab, self.length, self.pool_kind = vocab, length, pool
        self.end, self.post_norm = end, norm == "post"
        self.causal, self.hide_padding, self.pad = causal, hide_padding, pad
        self.remat, self.unroll = remat, unroll
        kind = dict(activation=activation, eps=eps)
        self.tokens = weight(rngs, (vocab, size.width), ("token", "embed"), weights.normal(size.width**-0.5))
        self.positions = weight(rngs, (length, size.width), (None, "embed"), weights.normal(size.width**-0.5))
        block = BertBlock if self.post_norm else EncoderBlock
        self.blocks = stack(lambda r: block(size, r, **kind), size.depth, rngs)
        self.norm = LayerNorm(size.width, eps=eps, rngs=rngs)
        self.map = MapHead(size, rngs, **kind) if pool == "map" else None
        self.head = Dense(
            (size.width, out),
            ("embed", None),
            weights.lecun_normal(size.width),
            bias=(out,) if out_bias else None,
            rngs=rngs,
        )

    def hidden(self, text_BL, *, dtype=jnp.float32) -> jax.Array:
        """Token states (B, L, D) behind the last LN, of texts of at most `length` tokens."""
        real_BL = real(text_BL)
        ids_BL = jnp.where(real_BL, text_BL, self.pad)
        x = self.tokens[...][ids_BL] + self.positions[...][None, : text_BL.shape[1]]
        x = self.norm(x.astype(dtype)) if self.post_norm else x.astype(dtype)
        x = constrain(x, "batch", None, None)
        mask = real_BL[:, None, None] if self.hide_padding else None

        def body(block, h, _):
            return block(h, mask=mask, causal=self.causal)

        x = scan(self.blocks, body, x, remat=self.remat, unroll=self.unroll)
        return x if self.post_norm else self.norm(x)

    def pooled(self, hidden_BLD, text_BL) -> jax.Array:
        """One state (B, D) a text."""
        if self.pool_kind == "map":
            return self.map(hidden_BLD)
        if self.pool_kind == "max":
            return hidden_BLD.max(axis=1)
        if self.pool_kind == "mean":
            if not self.hide_padding:
                return hidden_BLD.mean(axis=1)
            real_BL1 = real(text_BL).astype(hidden_BLD.dtype)[..., None]
            return (hidden_BLD * real_BL1).sum(axis=1) / jnp.maximum(real_BL1.sum(axis=1), 1)
        if self.pool_kind in ("argmax", "eos"):
            scores_BL = text_BL if self.pool_kind == "argmax" else (text_BL == self.end).astype(jnp.int32)
            place_B11 = jnp.argmax(scores_BL, axis=1)[:, None, None]
            return jnp.take_along_axis(hidden_BLD, place_B11, axis=1)[:, 0]
        return hidden_BLD[:, 0 if self.pool_kind == "first" else -1]

    def __call__(self, text_BL, *, dtype=jnp.float32) -> jax.Array:
        """Projected vectors (B, out), not normalised."""
        return self.head(self.pooled(self.hidden(text_BL, dtype=dtype), text_BL))
