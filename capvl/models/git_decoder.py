"""GIT's decoder (arXiv 2205.14100): text behind image tokens in one transformer, or with cross-attention to them.

As no image token sees the text, the prefix is run once and every layer's keys and values of it are kept; the text
then attends to them and to itself by one softmax.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.models import flops, sizes
from capvl.models.features import Level
from capvl.models.sizes import Size
from capvl.models.text_decoder import shift_right, vocabulary_logits
from capvl.nn import weights
from capvl.nn.attention import CrossAttention, SelfAttention, attend, attend_jointly
from capvl.nn.layers import Dense, LayerNorm, Mlp, drop
from capvl.nn.padding import real
from capvl.nn.stack import layer_of, part_of, scan, scan_outputs, stack
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain


def bert_normal(width: int):
    """Gaussian weights of BERT's standard deviation, 0.02 at a width of 768; narrower decoders have larger ones.

    In proportion: with the square root of the widths' ratio, attention to the image begins so flat that a decoder of
    128 takes half as many steps again.
    """
    return weights.normal(0.02 * 768 / width)


class ImageKeys(NamedTuple):
    """What the text attends to of each image: keys and values (layers, B, N, H, K), and which are valid (1, B, N)."""

    keys: jax.Array
    values: jax.Array
    valid: jax.Array

    def mask(self, rows: int) -> jax.Array:
        """The attention mask of `rows` texts, (rows, 1, 1, N); consecutive texts share an image."""
        return jnp.repeat(self.valid[0], rows // self.valid.shape[1], axis=0)[:, None, None]


class GitBlock(nnx.Module):
    """x = LN(x + f(x)) ("post") or x + f(LN x) ("pre"); f is self-attention, cross-attention if there is one, MLP."""

    def __init__(self, size: Size, options: Any, rngs: nnx.Rngs):
        self.post, self.dropout = options.norm == "post", options.dropout
        eps, init = dict(eps=options.text_eps, rngs=rngs), bert_normal(size.width)
        self.attn = SelfAttention(size.width, size.heads, init=init, rngs=rngs)
        self.norm1 = LayerNorm(size.width, **eps)
        crosses = options.fusion == "cross"
        self.cross_attn = CrossAttention(size.width, size.heads, init=init, rngs=rngs) if crosses else None
        self.cross_norm = LayerNorm(size.width, **eps) if crosses else None
        self.mlp = Mlp(size.width, size.mlp, activation=options.text_activation, init=init, rngs=rngs)
        self.norm2 = LayerNorm(size.width, **eps)

    def _residual(self, norm, x, function, key) -> jax.Array:
        added = drop(function(x if self.post else norm(x)), self.dropout, key)
        return checkpoint_name(norm(x + added) if self.post else x + added, "residual")

    def _run(self, x_BLD, attention, image, keys) -> jax.Array:
        """The block with a given self-attention; `image` is the cross-attention's part, `keys` are for dropout."""
        x_BLD = self._residual(self.norm1, x_BLD, attention, keys[0])
        if self.cross_attn is not None:

            def cross_attention(x):
                q_BTHK = self.cross_attn.q(x)[:, :, 0]
                attended = self.cross_attn.out(attend_jointly(q_BTHK, [image], dropout=self.dropout, key=keys[1]))
                # A text without an image has nothing to attend to, and a softmax over nothing would be even.
                return jnp.where(image[2].any(axis=(1, 2, 3))[:, None, None], attended, jnp.zeros((), attended.dtype))

            x_BLD = self._residual(self.cross_norm, x_BLD, cross_attention, keys[2])
        return constrain(self._residual(self.norm2, x_BLD, self.mlp, keys[3]), "batch", None, None)

    def prefix(self, x_BND, mask, key) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Image tokens, which see each other: their next states, and their keys and values."""
        keys, kv = _split(key, 5), []

        def attention(x):
            q, k, v = self.attn.project(x)
            kv.extend((k, v))
            if keys[4] is None:
                return self.attn.out(attend(q, k, v, mask=mask))
            return self.attn.out(attend_jointly(q, [(k, v, mask)], dropout=self.dropout, key=keys[4]))

        x_BND = self._run(x_BND, attention, None, keys)
        return x_BND, tuple(kv)

    def prefix_keys(self, x_BND) -> tuple[jax.Array, jax.Array]:
        """Keys and values of image tokens only: all that the last block is asked for."""
        x_BND = x_BND if self.post else self.norm1(x_BND)
        kv_BNcHK = self.attn.qkv.columns(x_BND, 1, 3)
        return kv_BNcHK[:, :, 0], kv_BNcHK[:, :, 1]

    def text(self, x_BLD, image, mask, key) -> jax.Array:
        """Text tokens, which see the image and, by the mask, each other."""
        keys = _split(key, 5)

        def attention(x):
            q, k, v = self.attn.project(x)
            parts = [(k, v, mask)] if self.cross_attn is not None else [image, (k, v, mask)]
            return self.attn.out(attend_jointly(q, parts, dropout=self.dropout, key=keys[4]))

        return self._run(x_BLD, attention, image, keys)

    def step(self, x_R1D, image, cache, index):
        """One token of each row with a key-value cache; rows are a multiple of the images."""
        new_cache = []

        def attention(x):
            q, *kv, mask = self.attn.append_to_cache(x, cache, index)
            new_cache.extend(kv)
            parts = [(*kv, mask)] if self.cross_attn is not None else [image, (*kv, mask)]
            return self.attn.out(attend_jointly(q, parts))

        x_R1D = self._run(x_R1D, attention, image, _split(None, 5))
        return x_R1D, tuple(new_cache)


def _split(key, count: int):
    return (None,) * count if key is None else jax.random.split(key, count)


class GitDecoder(nnx.Module):
    """Writes text behind image tokens; see `capvl.models.text_decoder.TextDecoder` for what is asked of a decoder.

    Id 0 is padding; the output layer is the token table with a bias (section 8 of BERT's code, arXiv 1810.04805), or,
    where `options.tied` is False, one of its own.
    """

    def __init__(self, options: Any, *, rngs: nnx.Rngs):
        size, width = sizes.parse_size(options.text), options.encoder_width
        self.vocab, self.start, self.depth, self.length = options.vocab, options.start, size.depth, options.length
        self.heads, self.head_width = size.heads, size.width // size.heads
        self.crosses, self.dropout = options.fusion == "cross", options.dropout
        self.remat, self.unroll = options.remat, options.unroll
        init = bert_normal(size.width)
        self.visual = Dense((width, size.width), ("embed", None), init, bias=(size.width,), rngs=rngs)
        self.visual_norm = LayerNorm(size.width, eps=1e-5, rngs=rngs) if options.projection_norm else None
        self.tokens = weight(rngs, (options.vocab, size.width), ("vocab", "embed"), init)
        self.positions = weight(rngs, (options.text_positions, size.width), (None, "embed"), init)
        self.embedding_norm = LayerNorm(size.width, eps=options.embedding_eps, rngs=rngs)
        self.blocks = stack(lambda r: GitBlock(size, options, r), size.depth, rngs)
        if self.crosses:
            shape = (size.depth, size.width, 2, size.heads, self.head_width)
            self.cross_kv = weight(rngs, shape, ("layers", "embed", None, "heads", None), init)
        self.norm = LayerNorm(size.width, eps=options.text_eps, rngs=rngs) if options.norm == "pre" else None
        if options.tied:
            self.logits, self.bias = None, weight(rngs, (options.vocab,), ("vocab",), weights.zeros)
        else:
            shape, axes = (size.width, options.vocab), ("embed", "vocab")
            self.logits = Dense(shape, axes, init, bias=(options.vocab,), rngs=rngs)

    def project_image(self, encoded_BND) -> jax.Array:
        """Image tokens in the decoder's width, (B, N, D)."""
        x = self.visual(encoded_BND)
        return x if self.visual_norm is None else self.visual_norm(x)

    def image_kv(self, encoded, *, context_BC=None, key=None) -> ImageKeys:
        """What the text will attend to of encoded images: the prefix's keys and values in every layer.

        Args:
          encoded: tokens (B, N, D) of an encoder, or a level whose images are padded.
          context_BC: int32 tokens of further text that joins the image's (such as what was read in it); 0 is padding.
          key: of the dropout, in training.
        """
        x, valid = (encoded.tokens_BND, encoded.valid_BN) if isinstance(encoded, Level) else (encoded, None)
        whole = valid is None and context_BC is None
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        x = self.project_image(x)
        if context_BC is not None:
            x = jnp.concatenate([x, self.embed(context_BC).astype(x.dtype)], axis=1)
            valid = jnp.concatenate([valid, real(context_BC)], axis=1)
        x = constrain(x, "batch", None, None)
        if self.crosses:
            kernel = self.cross_kv[...].astype(x.dtype)
            return ImageKeys(*(jnp.einsum("bnd,ydhk->ybnhk", x, kernel[:, :, c]) for c in (0, 1)), valid[None])
        mask = None if whole else valid[:, None, None]
        run = dict(remat=self.remat, unroll=self.unroll)
        last = layer_of(self.blocks, self.depth - 1)
        kv = ()
        if self.depth > 1:
            keys = None if key is None else jax.random.split(key, self.depth - 1)
            first = part_of(self.blocks, 0, self.depth - 1)
            x, kv = scan_outputs(first, lambda block, x, k: block.prefix(x, mask, k), x, keys, **run)
        of_last = last.prefix_keys(x)
        return ImageKeys(
            *(jnp.concatenate([*kv[c : c + 1], of_last[c][None]]) for c in (0, 1)),
            valid[None],
        )

    def embed(self, tokens_BL, places_L=None) -> jax.Array:
        """LN of token plus position, (B, L, D) float32."""
        positions = self.positions[...]
        positions = positions[: tokens_BL.shape[1]] if places_L is None else positions[places_L]
        return self.embedding_norm(self.tokens[...][tokens_BL] + positions[None])

    def __call__(
        self, inputs_BL, image_kv, *, mask=None, causal=False, places_L=None, dtype=jnp.float32, key=None
    ) -> jax.Array:
        """Hidden states (B, L, D) that the output layer reads.

        Args:
          inputs_BL: int32 ids that the decoder reads.
          image_kv: what `image_kv` returned, for B images, or fewer: consecutive rows then share one.
          mask: boolean among the text, broadcastable to (B, H, L, L); None for all.
          causal: whether position l sees positions 0..l only.
          places_L: the text position of each input, where it isn't 0, 1, 2, …
          key: of the dropout, in training.
        """
        if causal:
            triangle = jnp.tril(jnp.ones((inputs_BL.shape[1],) * 2, bool))[None, None]
            mask = triangle if mask is None else mask & triangle
        own, first = (None, None) if key is None else jax.random.split(key)
        y = drop(self.embed(inputs_BL, places_L).astype(dtype), self.dropout, first)
        keys = None if own is None else jax.random.split(own, self.depth)
        image_mask = image_kv.mask(len(inputs_BL))

        def body(block, y, xs):
            return block.text(y, (*xs[:2], image_mask), mask, xs[2])

        y = constrain(y, "batch", None, None)
        y = scan(self.blocks, body, y, (*image_kv[:2], keys), remat=self.remat, unroll=self.unroll)
        return y if self.norm is None else self.norm(y)

    def causal(self, labels_BL, image_kv, *, dtype=jnp.float32, key=None) -> jax.Array:
        """Hidden states (B, L, D) that predict `labels_BL` from the image and the tokens before."""
        return self(shift_right(labels_BL, self.start), image_kv, causal=True, dtype=dtype, key=key)

    def output_layer(self) -> tuple[jax.Array, jax.Array]:
        """Kernel (D, V), the token table's transpose where it is tied, and bias (V,)."""
        if self.logits is not None:
            return self.logits.kernel[...], self.logits.bias[...]
        return self.tokens[...].T, self.bias[...]

    def project(self, hidden_BLD) -> jax.Array:
        """Logits (B, L, V) in float32."""
        return vocabulary_logits(hidden_BLD, *self.output_layer())

    def init_cache(self, batch: int, length: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
        """Empty caches of the text: two zero arrays (layers, batch, length, H, K)."""
        shape = (self.depth, batch, length, self.heads, self.head_width)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def step(self, token_R, image_kv, cache, index, *, dtype=jnp.float32):
        """Logits (R, V) after reading one token at position `index`, and the updated cache; R is a multiple of B."""
        place_1 = jnp.asarray(index)[None]
        y = self.embed(token_R[:, None], place_1).astype(dtype)
        image_mask = image_kv.mask(len(token_R))

        def layer(block, y, xs):
            keys, values, block_cache = xs
            return block.step(y, (keys, values, image_mask), block_cache, index)

        y, cache = scan_outputs(self.blocks, layer, y, (*image_kv[:2], cache))
        y = y if self.norm is None else self.norm(y)
        return self.project(y)[:, 0], cache


def image_kv_flops(size: Size, visual: int, image_tokens: int, fusion: str) -> float:
    """Forward matmul FLOPs of one image's keys and values in all layers; `visual` is the encoder's width."""
    kv = 2 * flops.dense(image_tokens, size.width, size.width)
    project = flops.dense(image_tokens, visual, size.width)
    if fusion == "cross":
        return project + size.depth * kv
    # The last layer gives keys and values of the image only.
    return project + (size.depth - 1) * flops.layer(image_tokens, size) + kv


def text_flops(size: Size, vocab: int, length: int, image_tokens: int, fusion: str) -> float:
    """Forward matmul FLOPs of one text behind an image whose keys and values are there, output layer included."""
    attend_image = flops.cross_attention if fusion == "cross" else flops.attention
    layer = flops.layer(length, size) + attend_image(length, image_tokens, size.width)
    return size.depth * layer + flops.dense(length, size.width, vocab)
