"""The captioner's text decoder: pre-LN transformer with cross-attention to image tokens (CapPa, section 3).

No biases but in the last LN and the output layer; output layer not tied and zero-initialised;
one more embedding row, of id V, for [MASK].
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.models import flops
from capvl.models.sizes import Size
from capvl.nn import weights
from capvl.nn.attention import CrossAttention, SelfAttention
from capvl.nn.layers import Dense, LayerNorm, Mlp, merge_leading
from capvl.nn.stack import layer_of, part_of, scan, stack
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain


class DecoderBlock(nnx.Module):
    """y += SelfAttention(LN y); y += CrossAttention(LN y, image); y += MLP(LN y)."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(size.width, bias=False, rngs=rngs)
        self.self_attn = SelfAttention(size.width, size.heads, bias=False, rngs=rngs)
        self.norm2 = LayerNorm(size.width, bias=False, rngs=rngs)
        self.cross_attn = CrossAttention(size.width, size.heads, bias=False, rngs=rngs)
        self.norm3 = LayerNorm(size.width, bias=False, rngs=rngs)
        self.mlp = Mlp(size.width, size.mlp, bias=False, rngs=rngs)

    def __call__(self, y_BLD, image_kv, *, mask=None, causal: bool = False) -> jax.Array:
        y_BLD = checkpoint_name(y_BLD + self.self_attn(self.norm1(y_BLD), mask=mask, causal=causal), "residual")
        return self.after_self_attention(y_BLD, image_kv)

    def after_self_attention(self, y_BLD, image_kv) -> jax.Array:
        """The block after its self-attention."""
        y_BLD = checkpoint_name(y_BLD + self.cross_attn(self.norm2(y_BLD), *image_kv), "residual")
        return constrain(y_BLD + self.mlp(self.norm3(y_BLD)), "batch", None, None)

    def step(self, y_B1D, image_kv, cache, index):
        """One decoding step with a key-value cache; see `SelfAttention.step`."""
        attended, cache = self.self_attn.step(self.norm1(y_B1D), cache, index)
        return self.after_self_attention(y_B1D + attended, image_kv), cache


class TextDecoder(nnx.Module):
    """Text decoder over image tokens; tokens 1..V-1 are text, 0 is padding and start, V is [MASK].

    What captioning, scoring and search ask of any decoder: `image_kv`, `causal`, `__call__`, `step`, `init_cache`,
    `output_layer`, `project`, and `start`, the token that is read before the first.
    """

    start = 0

    def __init__(
        self,
        size: Size,
        vocab: int,
        length: int,
        *,
        remat: str = "none",
        unroll: bool = False,
        rngs: nnx.Rngs,
    ):
        width, heads = size.width, size.heads
        self.vocab, self.length, self.depth = vocab, length, size.depth
        self.remat, self.unroll = remat, unroll
        self.tokens = weight(rngs, (vocab + 1, width), ("token", "embed"), weights.normal(1.0))
        self.positions = weight(rngs, (length, width), (None, "embed"), weights.normal(width**-0.5))
        # Cross-attention keys and values of all layers, one matmul.
        self.cross_kv = weight(
            rngs,
            (size.depth, width, 2, heads, width // heads),
            ("layers", "embed", None, "heads", None),
            weights.xavier_uniform(width, width),
        )
        self.blocks = stack(lambda r: DecoderBlock(size, r), size.depth, rngs)
        self.norm = LayerNorm(width, rngs=rngs)
        self.logits = Dense((width, vocab), ("embed", "vocab"), weights.zeros, bias=(vocab,), rngs=rngs)

    def image_kv(self, encoded_BND) -> tuple[jax.Array, jax.Array]:
        """Keys and values of every layer for the image tokens: two arrays (layers, B, N, H, K)."""
        kernel = self.cross_kv[...].astype(encoded_BND.dtype)
        x = merge_leading(encoded_BND)
        keys, values = (jnp.einsum("...d,ydhk->y...hk", x, kernel[:, :, c]) for c in (0, 1))
        shape = (len(kernel), *encoded_BND.shape[:2], *kernel.shape[3:])
        return keys.reshape(shape), values.reshape(shape)

    def embed(self, tokens_BL, places_L=None) -> jax.Array:
        """Token embedding plus position, (B, L, D) float32."""
        positions = self.positions[...]
        positions = positions[: tokens_BL.shape[1]] if places_L is None else positions[places_L]
        return self.tokens[...][tokens_BL] + positions[None]

    def __call__(
        self, inputs_BL, image_kv, *, mask=None, causal: bool = False, places_L=None, dtype=jnp.float32
    ) -> jax.Array:
        """Hidden states (B, L, D) after the last LN.

        Args:
          inputs_BL: int32 ids that the decoder reads (shifted text, or [MASK]).
          image_kv: what `image_kv` returned, for B images.
          mask: optional boolean self-attention mask, broadcastable to (B, H, L, L).
          causal: whether position l sees positions 0..l only.
          places_L: the text position of each input, where it isn't 0, 1, 2, …
        """
        y = constrain(self.embed(inputs_BL, places_L).astype(dtype), "batch", None, None)

        def body(block, y, kv):
            return block(y, kv, mask=mask, causal=causal)

        return self.norm(scan(self.blocks, body, y, image_kv, remat=self.remat, unroll=self.unroll))

    def causal(self, labels_BL, image_kv, *, dtype=jnp.float32) -> jax.Array:
        """Hidden states (B, L, D) that predict `labels_BL` from the image and earlier tokens (Cap)."""
        return self(shift_right(labels_BL), image_kv, causal=True, dtype=dtype)

    def parallel(self, length: int, image_kv, *, dtype=jnp.float32) -> jax.Array:
        """Hidden states (B, L, D) of parallel prediction: every input is [MASK], nothing is causal.

        Until its first cross-attention the decoder sees the same input in every example, so that
        much is computed once and broadcast.
        """
        y_1LD = (self.tokens[...][self.vocab][None, None] + self.positions[...][None, :length]).astype(dtype)
        batch = image_kv[0].shape[1]
        first = layer_of(self.blocks, 0)
        y_1LD = y_1LD + first.self_attn(first.norm1(y_1LD))
        y = constrain(jnp.broadcast_to(y_1LD, (batch, *y_1LD.shape[1:])), "batch", None, None)
        y = first.after_self_attention(y, jax.tree.map(lambda kv: kv[0], image_kv))
        if self.depth > 1:
            rest = part_of(self.blocks, 1, self.depth)
            rest_kv = jax.tree.map(lambda kv: kv[1:], image_kv)
            y = scan(rest, lambda block, y, kv: block(y, kv), y, rest_kv, remat=self.remat, unroll=self.unroll)
        return self.norm(y)

    def output_layer(self) -> tuple[jax.Array, jax.Array]:
        """Kernel (D, V) and bias (V,) of the logits; training uses `capvl.losses.vocabulary` with them."""
        return self.logits.kernel[...], self.logits.bias[...]

    def project(self, hidden_BLD) -> jax.Array:
        """Logits (B, L, V) in float32."""
        return vocabulary_logits(hidden_BLD, *self.output_layer())

    def init_cache(self, batch: int, length: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
        """Empty self-attention caches: two zero arrays (layers, B, length, H, K)."""
        heads, head_width = self.cross_kv.shape[-2:]
        shape = (self.depth, batch, length, heads, head_width)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def step(self, token_B, image_kv, cache, index, *, dtype=jnp.float32):
        """Logits (B, V) after reading one token at position `index`, and the updated cache; B may be a multiple of the
        images, each of which consecutive rows then share."""
        position_1D = jax.lax.dynamic_slice_in_dim(self.positions[...], index, 1)
        y = (self.tokens[...][token_B][:, None] + position_1D[None]).astype(dtype)
        graphdef, params = nnx.split(self.blocks)

        def layer(y, xs):
            block_params, kv, block_cache = xs
            return nnx.merge(graphdef, block_params).step(y, kv, block_cache, index)

        y, cache = jax.lax.scan(layer, y, (params, image_kv, cache))
        return self.project(self.norm(y))[:, 0], cache


def image_kv_flops(size: Size, image_tokens: int) -> float:
    """Forward matmul FLOPs of one image's keys and values in all layers."""
    return size.depth * 2 * flops.dense(image_tokens, size.width, size.width)


def text_flops(size: Size, vocab: int, length: int, image_tokens: int) -> float:
    """Forward matmul FLOPs of one text behind an image whose keys and values are there, output layer included."""
    layer = flops.layer(length, size) + flops.cross_attention(length, image_tokens, size.width)
    return size.depth * layer + flops.dense(length, size.width, vocab)


def vocabulary_logits(hidden_BLD, kernel_DV, bias_V) -> jax.Array:
    """Logits (B, L, V) in float32 of an output layer."""
    kernel_DV = kernel_DV.astype(hidden_BLD.dtype)
    logits_BLV = jnp.einsum("bld,dv->blv", hidden_BLD, kernel_DV, preferred_element_type=jnp.float32)
    return logits_BLV + bias_V[None, None]


def shift_right(tokens_BL, start: int = 0) -> jax.Array:
    """Decoder inputs of next-token prediction: the start token in front, the last token dropped."""
    return jnp.pad(tokens_BL, ((0, 0), (1, 0)), constant_values=start)[:, :-1]
