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
from capvl.nn.attention import SelfAttention, attend_with_dropout
from capvl.nn.layers import ACTIVATIONS, Dense, LayerNorm, Mlp, clip, drop
from capvl.nn.padding import real
from capvl.nn.stack import scan, scan_outputs, stack
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain

HEADS = ("pretraining", "words", "pooler", "none")
INIT = 0.02
"""Standard deviation of all weights at first, BERT's. With larger ones, as those that keep the variance of a layer's
input, what all tokens have in common grows with every layer, and words are hardly told apart."""


@dataclasses.dataclass(frozen=True)
class BertOptions:
    """What a BERT is made of.

    Attributes:
      text: its size (`capvl.models.sizes`).
      vocab, length, types: number of token ids, text positions, and segment ids.
      heads: what stands behind the states: "pretraining" (pooler and both heads), "words" (the masked-language-model
        head), "pooler", or "none".
      pad: id that is read where a text has padding (RoBERTa: 1).
      first_position: row of the position table of a text's first token; padding has the row before it where that is not
        0 (RoBERTa: 2).
      dropout: in training: of attention weights, and of what attention and MLP add.
      activation, eps, dtype, remat, unroll: as in `capvl.models.vision.ImageOptions`.
    """

    text: str = "B"
    vocab: int = 30_522
    length: int = 512
    types: int = 2
    heads: str = "pretraining"
    pad: int = 0
    first_position: int = 0
    dropout: float = 0.0
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
        if not 0 <= self.pad < self.vocab or self.first_position < 0 or not 0 <= self.dropout < 1:
            raise UserError("A BERT's pad is an id below vocab, first_position not negative, dropout in [0, 1).")
        if self.heads not in HEADS:
            raise UserError(f"A BERT's heads are one of {', '.join(HEADS)}, not {self.heads!r}.")

    def make(self, rngs: nnx.Rngs) -> "Bert":
        """Builds the model."""
        return Bert(self, rngs=rngs)


class BertBlock(nnx.Module):
    """x = LN(x + Attention(x)); x = LN(x + MLP(x)).

    limit: not 0: attention logits, what both Denses of the MLP give, and the output are clipped to ±limit (GLIP's layer
    on texts between its fusions).
    """

    def __init__(
        self,
        size: Size,
        rngs: nnx.Rngs,
        *,
        activation: str = "gelu",
        eps: float = 1e-12,
        dropout: float = 0.0,
        limit: float = 0.0,
    ):
        self.dropout, self.limit = dropout, limit
        init = weights.normal(INIT)
        self.attn = SelfAttention(size.width, size.heads, init=init, rngs=rngs)
        self.norm1 = LayerNorm(size.width, eps=eps, rngs=rngs)
        self.mlp = Mlp(size.width, size.mlp, activation=activation, init=init, rngs=rngs)
        self.norm2 = LayerNorm(size.width, eps=eps, rngs=rngs)

    def __call__(self, x_BLD, *, mask=None, causal: bool = False, key: jax.Array | None = None) -> jax.Array:
        keys = split_key(key, 2)
        x_BLD = self.attended(x_BLD, mask=mask, causal=causal, key=keys[0])
        return self.after_attention(x_BLD, keys[1])

    def attended(self, x_BLD, *, mask=None, causal: bool = False, key: jax.Array | None = None) -> jax.Array:
        """LN(x + Attention(x))."""
        keys = split_key(key, 2)
        q, k, v = self.attn.project(x_BLD)
        how = dict(dropout=self.dropout, key=keys[0], limit=self.limit)
        mixed = attend_with_dropout(q, k, v, mask=mask, causal=causal, **how)
        added = drop(self.attn.out(mixed), self.dropout, keys[1])
        return checkpoint_name(self.norm1(x_BLD + added), "residual")

    def after_attention(self, x_BLD, key: jax.Array | None = None) -> jax.Array:
        """LN(x + MLP(x))."""
        added = drop(self.mlp(x_BLD, self.limit), self.dropout, key)
        return constrain(clip(self.norm2(x_BLD + added), self.limit), "batch", None, None)


def split_key(key: jax.Array | None, count: int):
    """Keys for so many uses of a key; Nones of none, which means not training."""
    return (None,) * count if key is None else jax.random.split(key, count)


def layer_keys(key: jax.Array | None, depth: int) -> jax.Array | None:
    """A key for each layer of a stack; None of none."""
    return None if key is None else jax.random.split(key, depth)


class Bert(nnx.Module):
    """Token ids (B, L) -> states (B, L, D), and what its heads make of them: a pooled state, logits of both tasks."""

    def __init__(self, options: BertOptions, *, depth: int | None = None, rngs: nnx.Rngs):
        """depth: number of layers where it isn't that of `options.text`; 0 for a table and heads alone."""
        size = sizes.parse_size(options.text)
        width, init = size.width, weights.normal(INIT)
        self.dtype, self.activation = jnp.dtype(options.dtype), options.activation
        self.depth, self.dropout = size.depth if depth is None else depth, options.dropout
        self.remat, self.unroll = options.remat, options.unroll
        self.tokens = weight(rngs, (options.vocab, width), ("vocab", "embed"), init)
        self.positions = weight(rngs, (options.length, width), (None, "embed"), init)
        self.types = weight(rngs, (options.types, width), (None, "embed"), init)
        self.norm = LayerNorm(width, eps=options.eps, rngs=rngs)
        self.pad, self.first_position = options.pad, options.first_position
        kind = dict(activation=options.activation, eps=options.eps, dropout=options.dropout)
        self.blocks = stack(lambda r: BertBlock(size, r, **kind), self.depth, rngs) if self.depth else None
        square = dict(init=init, bias=(width,), rngs=rngs)
        pooled = options.heads in ("pretraining", "pooler")
        self.pooler = Dense((width, width), ("embed", None), **square) if pooled else None
        if options.heads not in ("pretraining", "words"):
            return
        self.transform = Dense((width, width), ("embed", None), **square)
        self.transform_norm = LayerNorm(width, eps=options.eps, rngs=rngs)
        self.word_bias = weight(rngs, (options.vocab,), ("vocab",), weights.zeros)
        if options.heads == "pretraining":
            self.next_sentence = Dense((width, 2), ("embed", None), init, bias=(2,), rngs=rngs)

    def embed(self, text_BL, types_BL=None) -> jax.Array:
        """What the first block reads: (B, L, D)."""
        types_BL = jnp.zeros_like(text_BL) if types_BL is None else types_BL
        if self.pad or self.first_position:
            text_BL = jnp.where(real(text_BL), text_BL, self.pad)
        x = self.tokens[...][text_BL] + self._positions(text_BL) + self.types[...][types_BL]
        return self.norm(x.astype(self.dtype))

    def _positions(self, text_BL) -> jax.Array:
        """Rows of the position table, (1, L, D) or, where padding has one of its own, (B, L, D)."""
        first, length = self.first_position, text_BL.shape[1]
        if not first:
            return self.positions[...][None, :length]
        row_1L = first + jnp.arange(length, dtype=jnp.int32)[None]
        return self.positions[...][jnp.where(text_BL == self.pad, first - 1, row_1L)]

    def __call__(self, text_BL, mask_BL, types_BL=None, *, causal: bool = False, key=None) -> jax.Array:
        """States (B, L, D); keys where `mask_BL` is False are hidden; a `key` means training."""
        keys = split_key(key, 2)
        x = self._first(text_BL, types_BL, keys[0])
        mask = mask_BL[:, None, None]

        def body(block, h, key):
            return block(h, mask=mask, causal=causal, key=key)

        return scan(self.blocks, body, x, layer_keys(keys[1], self.depth), remat=self.remat, unroll=self.unroll)

    def layers(self, text_BL, mask_BL, *, key=None) -> jax.Array:
        """States of all layers, (layers, B, L, D), the last of which are those that `__call__` gives."""
        keys = split_key(key, 2)
        mask = mask_BL[:, None, None]

        def body(block, h, key):
            h = block(h, mask=mask, key=key)
            return h, h

        x, xs = self._first(text_BL, None, keys[0]), layer_keys(keys[1], self.depth)
        return scan_outputs(self.blocks, body, x, xs, remat=self.remat, unroll=self.unroll)[1]

    def _first(self, text_BL, types_BL, key) -> jax.Array:
        return constrain(drop(self.embed(text_BL, types_BL), self.dropout, key), "batch", None, None)

    def pool(self, hidden_BLD) -> jax.Array:
        """tanh of a projection of the first position: (B, D)."""
        return jnp.tanh(self.pooler(hidden_BLD[:, 0]))

    def word_states(self, hidden_BLD) -> jax.Array:
        """What the masked-language-model's output layer reads: (B, L, D)."""
        return self.transform_norm(ACTIVATIONS[self.activation](self.transform(hidden_BLD)))

    def output_layer(self) -> tuple[jax.Array, jax.Array]:
        """Kernel (D, V) and bias (V,) of the masked-language-model's output layer; the kernel is the token table."""
        return self.tokens[...].T, self.word_bias[...]

    def word_logits(self, hidden_BLD) -> jax.Array:
        """Masked-language-model logits (B, L, V) float32."""
        y = self.word_states(hidden_BLD)
        table = self.tokens[...].astype(y.dtype)
        logits = jnp.einsum("bld,vd->blv", y, table, preferred_element_type=jnp.float32)
        return logits + self.word_bias[...].astype(jnp.float32)[None, None]

    def next_sentence_logits(self, hidden_BLD) -> jax.Array:
        """Next-sentence logits (B, 2) float32."""
        return self.next_sentence(self.pool(hidden_BLD)).astype(jnp.float32)
