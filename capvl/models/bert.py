"""BERT (arXiv 1810.04805): post-LN text encoder, with or without its pooler and both pre-training heads."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.abilities import Ability
from capvl.models.sizes import Size
from capvl.nn import weights
from capvl.nn.attention import SelfAttention
from capvl.nn.layers import ACTIVATIONS, Dense, LayerNorm, Mlp
from capvl.nn.stack import scan, stack
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain

HEADS = ("pretraining", "pooler", "none")


@dataclasses.dataclass(frozen=True)
class BertOptions:
    """What a BERT is made of.

    Attributes:
      text: its size (`capvl.models.sizes`).
      vocab, length, types: number of token ids, text positions, and segment ids.
      heads: what stands behind the states: "pretraining" (pooler and both heads), "pooler", or "none".
      activation, eps, dtype, remat, unroll: as in `capvl.models.vision.ImageOptions`.
    """

    text: str = "B"
    vocab: int = 30_522
    length: int = 512
    types: int = 2
    heads: str = "pretraining"
    activation: str = "gelu"
    eps: float = 1e-12
    dtype: str = "float32"
    remat: str = "none"
    unroll: bool = False

    reads_start: ClassVar[bool] = True
    abilities: ClassVar[frozenset[Ability]] = frozenset()
    """None: a BERT alone begins other models (`init_from`)."""

    def __post_init__(self):
        sizes.parse_size(self.text)
        if min(self.vocab, self.length, self.types) < 1:
            raise UserError("BERT's vocab, length and types must be at least 1.")
        if self.heads not in HEADS:
            raise UserError(f"A BERT's heads are one of {', '.join(HEADS)}, not {self.heads!r}.")

    def make(self, rngs: nnx.Rngs) -> "Bert":
        """Builds the model."""
        return Bert(self, rngs=rngs)


class BertBlock(nnx.Module):
    """x = LN(x + Attention(x)); x = LN(x + MLP(x))."""

    def __init__(self, size: Size, rngs: nnx.Rngs, *, activation: str = "gelu", eps: float = 1e-12):
        self.attn = SelfAttention(size.width, size.heads, rngs=rngs)
        self.norm1 = LayerNorm(size.width, eps=eps, rngs=rngs)
        self.mlp = Mlp(size.width, size.mlp, activation=activation, rngs=rngs)
        self.norm2 = LayerNorm(size.width, eps=eps, rngs=rngs)

    def __call__(self, x_BLD, *, mask=None, causal: bool = False) -> jax.Array:
        added = self.attn(x_BLD, mask=mask, causal=causal)
        x_BLD = checkpoint_name(self.norm1(x_BLD + added), "residual")
        return constrain(self.norm2(x_BLD + self.mlp(x_BLD)), "batch", None, None)


class Bert(nnx.Module):
    """Token ids (B, L) -> states (B, L, D), and what its heads make of them: a pooled state, logits of both tasks."""

    def __init__(self, options: BertOptions, *, rngs: nnx.Rngs):
        size = sizes.parse_size(options.text)
        width, init = size.width, weights.normal(0.02)
        self.dtype, self.activation = jnp.dtype(options.dtype), options.activation
        self.remat, self.unroll = options.remat, options.unroll
        self.tokens = weight(rngs, (options.vocab, width), ("vocab", "embed"), init)
        self.positions = weight(rngs, (options.length, width), (None, "embed"), init)
        self.types = weight(rngs, (options.types, width), (None, "embed"), init)
        self.norm = LayerNorm(width, eps=options.eps, rngs=rngs)
        kind = dict(activation=options.activation, eps=options.eps)
        self.blocks = stack(lambda r: BertBlock(size, r, **kind), size.depth, rngs)
        square = dict(init=init, bias=(width,), rngs=rngs)
        self.pooler = Dense((width, width), ("embed", None), **square) if options.heads != "none" else None
        if options.heads != "pretraining":
            return
        self.transform = Dense((width, width), ("embed", None), **square)
        self.transform_norm = LayerNorm(width, eps=options.eps, rngs=rngs)
        self.word_bias = weight(rngs, (options.vocab,), ("vocab",), weights.zeros)
        self.next_sentence = Dense((width, 2), ("embed", None), init, bias=(2,), rngs=rngs)

    def embed(self, text_BL, types_BL=None) -> jax.Array:
        """What the first block reads: (B, L, D)."""
        types_BL = jnp.zeros_like(text_BL) if types_BL is None else types_BL
        x = self.tokens[...][text_BL] + self.positions[...][None, : text_BL.shape[1]] + self.types[...][types_BL]
        return self.norm(x.astype(self.dtype))

    def __call__(self, text_BL, mask_BL, types_BL=None) -> jax.Array:
        """States (B, L, D); keys where `mask_BL` is False are hidden."""
        x = constrain(self.embed(text_BL, types_BL), "batch", None, None)
        mask = mask_BL[:, None, None]
        return scan(self.blocks, lambda block, h, _: block(h, mask=mask), x, remat=self.remat, unroll=self.unroll)

    def pool(self, hidden_BLD) -> jax.Array:
        """tanh of a projection of the first position: (B, D)."""
        return jnp.tanh(self.pooler(hidden_BLD[:, 0]))

    def word_logits(self, hidden_BLD) -> jax.Array:
        """Masked-language-model logits (B, L, V) float32; the output layer is the token table."""
        y = self.transform_norm(ACTIVATIONS[self.activation](self.transform(hidden_BLD)))
        table = self.tokens[...].astype(y.dtype)
        logits = jnp.einsum("bld,vd->blv", y, table, preferred_element_type=jnp.float32)
        return logits + self.word_bias[...].astype(jnp.float32)[None, None]

    def next_sentence_logits(self, hidden_BLD) -> jax.Array:
        """Next-sentence logits (B, 2) float32."""
        return self.next_sentence(self.pool(hidden_BLD)).astype(jnp.float32)
