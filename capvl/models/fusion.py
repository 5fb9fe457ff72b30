"""BERT or RoBERTa whose upper layers also attend to an image: text encoder and cross-modal encoder of ALBEF and X-VLM.

The lower layers are a plain BERT (arXiv 1810.04805), so that texts are encoded by themselves; each upper layer has
cross-attention between its self-attention and its MLP (arXiv 2107.07651, section 3.1; 2111.08276, section 3.1).

Letters beside those of `capvl.nn.weights`: C width of the image tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.models import flops
from capvl.models.bert import INIT, Bert, BertBlock, BertOptions, layer_keys, split_key
from capvl.models.sizes import Size, parse_size
from capvl.nn import weights
from capvl.nn.attention import CrossAttention, attend_with_dropout
from capvl.nn.layers import Dense, LayerNorm, drop
from capvl.nn.padding import real
from capvl.nn.stack import layer_of, scan, stack


class FusionBlock(BertBlock):
    """x = LN(x + Attention(x)); x = LN(x + CrossAttention(x, image)); x = LN(x + MLP(x))."""

    def __init__(self, size: Size, image_width: int, rngs: nnx.Rngs, *, activation: str, eps: float, dropout: float):
        super().__init__(size, rngs, activation=activation, eps=eps, dropout=dropout)
        init, heads = weights.normal(INIT), (2, size.heads, size.width // size.heads)
        axes = ("embed", None, "heads", None)
        self.cross_kv = Dense((image_width, *heads), axes, init, bias=heads, rngs=rngs)
        self.cross_attn = CrossAttention(size.width, size.heads, init=init, rngs=rngs)
        self.cross_norm = LayerNorm(size.width, eps=eps, rngs=rngs)

    def __call__(self, x_BLD, image_BNC, *, mask=None, image_mask=None, causal: bool = False, key=None) -> jax.Array:
        """One layer.

        Args:
          x_BLD: text states.
          image_BNC: image tokens; of B / g rows, where g consecutive texts look at one image.
          mask, image_mask: which text and image positions are seen, broadcastable to (B, H, L, L) and (B, H, L, N).
          causal: a position sees only itself and those before it.
          key: means training.
        """
        keys = split_key(key, 3)
        x_BLD = self.attended(x_BLD, mask=mask, causal=causal, key=keys[0])
        x_BLD = self.crossed(x_BLD, *self.image_kv(image_BNC), image_mask=image_mask, key=keys[1])
        return self.after_attention(x_BLD, keys[2])

    def image_kv(self, image_BNC) -> tuple[jax.Array, jax.Array]:
        """Keys and values (B, N, H, K) of image tokens."""
        kv_BNcHK = checkpoint_name(self.cross_kv(image_BNC), "qkv")
        return kv_BNcHK[:, :, 0], kv_BNcHK[:, :, 1]

    def crossed(self, x_BLD, k_BNHK, v_BNHK, *, image_mask=None, key=None) -> jax.Array:
        """LN(x + CrossAttention(x, image))."""
        keys = split_key(key, 2)
        q_BLHK = checkpoint_name(self.cross_attn.q(x_BLD)[:, :, 0], "cross_q")
        mixed = attend_with_dropout(q_BLHK, k_BNHK, v_BNHK, mask=image_mask, dropout=self.dropout, key=keys[0])
        return self.after_cross_attention(x_BLD, mixed, keys[1])

    def cross_weights(self, x_BLD, k_BNHK, *, image_mask=None) -> jax.Array:
        """What `crossed` weighs values by: softmax over image tokens, (B, H, L, N) float32."""
        q_BLHK = self.cross_attn.q(x_BLD)[:, :, 0]
        logits = jnp.einsum("blhk,bnhk->bhln", q_BLHK * q_BLHK.shape[-1] ** -0.5, k_BNHK).astype(jnp.float32)
        return jax.nn.softmax(logits if image_mask is None else jnp.where(image_mask, logits, -1e9))

    def after_cross_attention(self, x_BLD, mixed_BLHK, key=None) -> jax.Array:
        """LN(x + projection of what the heads of the cross-attention mixed)."""
        return self.cross_norm(x_BLD + drop(self.cross_attn.out(mixed_BLHK), self.dropout, key))


class TwoImageBlock(nnx.Module):
    """Two layers for texts about two images: the first looks at one image, the second at the other (X-VLM for NLVR2).

    Keys and values of both are one projection's, as the official weights tie them.
    """

    def __init__(self, size: Size, image_width: int, rngs: nnx.Rngs, **kind):
        self.first, self.second = (FusionBlock(size, image_width, rngs, **kind) for _ in range(2))
        self.second.cross_kv = self.first.cross_kv

    def __call__(self, x_BLD, images, *, mask=None, image_mask=None, causal: bool = False, key=None) -> jax.Array:
        """As `FusionBlock`, with a pair of image tokens, and of masks of them where these aren't None."""
        masks, keys = image_mask or (None, None), split_key(key, 2)
        for block, image_BNC, seen, own_key in zip((self.first, self.second), images, masks, keys, strict=True):
            x_BLD = block(x_BLD, image_BNC, mask=mask, image_mask=seen, causal=causal, key=own_key)
        return x_BLD


class FusionBert(Bert):
    """A BERT of the lower layers, and the upper ones, which look at images."""

    def __init__(
        self,
        options: BertOptions,
        cross_layers: int,
        image_width: int,
        block: type = FusionBlock,
        *,
        lower: int | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes it.

        Args:
          options: of the lower layers.
          cross_layers: how many there are above them.
          image_width: C.
          block: the class of these; with `TwoImageBlock` each of them is two, and `fuse` takes pairs of images.
          lower: number of lower layers where it isn't that of `options`; 0 for none.
          rngs: of the weights.
        """
        super().__init__(options, depth=lower, rngs=rngs)
        size = parse_size(options.text)
        kind = dict(activation=options.activation, eps=options.eps, dropout=options.dropout)
        self.cross = stack(lambda r: block(size, image_width, r, **kind), cross_layers, rngs)
        self.cross_layers = cross_layers

    def states(self, text_BL, *, causal: bool = False, key=None) -> jax.Array:
        """Texts by themselves: states (B, L, D) of the lower layers; 0 behind a text is padding."""
        return self(text_BL, real(text_BL), causal=causal, key=key)

    def fuse(
        self, states_BLD, text_BL, image_BNC, image_mask_BN=None, *, causal: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """The upper layers: states (B, L, D) of texts that look at images.

        Args:
          states_BLD: of `states`.
          text_BL: their tokens; padding is not seen.
          image_BNC: image tokens; of B / g rows, where g consecutive texts look at one image. A pair of them with
            `TwoImageBlock`.
          image_mask_BN: which of them are seen, of as many rows (or a pair); None for all.
          causal: a position sees only itself and those before it.
          key: means training.
        """
        mask = real(text_BL)[:, None, None]
        image_mask = jax.tree.map(lambda m: jnp.repeat(m, len(text_BL) // len(m), axis=0)[:, None, None], image_mask_BN)

        def body(block, h, key):
            return block(h, image_BNC, mask=mask, image_mask=image_mask, causal=causal, key=key)

        keys = layer_keys(key, self.cross_layers)
        return scan(self.cross, body, states_BLD, keys, remat=self.remat, unroll=self.unroll)

    def opened(self, states_BLD, text_BL, image_BNC, layer: int) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """The upper layers with the cross-attention of one of them laid open, for Grad-CAM.

        Args:
          states_BLD, text_BL, image_BNC: as for `fuse`.
          layer: number of an upper layer, from 0.

        Returns:
          Its weights (B, H, L, N) float32, and the function from such weights to what `fuse` gives.
        """
        mask = real(text_BL)[:, None, None]
        x = states_BLD
        for number in range(layer):
            x = layer_of(self.cross, number)(x, image_BNC, mask=mask)
        block = layer_of(self.cross, layer)
        x = block.attended(x, mask=mask)
        repeats = len(text_BL) // len(image_BNC)
        k_BNHK, v_BNHK = (jnp.repeat(part, repeats, axis=0) for part in block.image_kv(image_BNC))

        def fused(weights_BHLN):
            mixed = jnp.einsum("bhln,bnhk->blhk", weights_BHLN.astype(v_BNHK.dtype), v_BNHK)
            h = block.after_attention(block.after_cross_attention(x, mixed))
            for number in range(layer + 1, self.cross_layers):
                h = layer_of(self.cross, number)(h, image_BNC, mask=mask)
            return h

        return block.cross_weights(x, k_BNHK), fused


def fusion_flops(size: Size, layers: int, length: int, image_tokens: int, image_width: int) -> float:
    """Forward matmul FLOPs of one text through upper layers, keys and values of its image included."""
    kv = 2 * flops.dense(image_tokens, image_width, size.width)
    return layers * (flops.layer(length, size) + flops.cross_attention(length, image_tokens, size.width) + kv)
