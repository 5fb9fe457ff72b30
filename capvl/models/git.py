"""GIT (arXiv 2205.14100): image tokens as the prefix of a transformer that writes text.

The encoder's tokens, projected and normalised, stand before the embedded text in one transformer: they see each
other, the text sees them and what is before it. As no image token sees the text, the prefix is run once and every
layer's keys and values of it are kept; the text then attends to them and to itself by one softmax. `fusion="cross"`
is the paper's comparison (section 4.6): blocks with cross-attention to the projected tokens instead.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.abilities import Ability
from capvl.models.sizes import Size
from capvl.models.text_decoder import shift_right, vocabulary_logits
from capvl.models.vit import Padded, ViTOptions
from capvl.nn import weights
from capvl.nn.attention import CrossAttention, SelfAttention, attend, attend_jointly
from capvl.nn.layers import Dense, LayerNorm, Mlp, drop
from capvl.nn.padding import real
from capvl.nn.stack import layer_of, part_of, scan, scan_outputs, stack
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain


def small(width: int):
    """Gaussian weights of BERT's standard deviation, 0.02 at a width of 768; narrower decoders have larger ones.

    In proportion: with the square root of the widths' ratio, attention to the image begins so flat that a decoder of
    128 takes half as many steps again.
    """
    return weights.normal(0.02 * 768 / width)


@dataclasses.dataclass(frozen=True)
class GitOptions(ViTOptions):
    """What a GIT is made of; `config.model` of a recipe. The defaults are GIT_B's.

    Attributes:
      text: size of the decoder (`capvl.models.sizes`).
      vocab, start: number of token ids, and the id that is read before a text ([CLS]).
      length: tokens of a text, the end included.
      text_positions: rows of the position table.
      tied: the output layer is the token table with a bias; else it has a kernel of its own.
      fusion: "prefix" or "cross".
      norm: where the decoder's layer norms are: "post" (as BERT's) or "pre".
      projection_norm: a layer norm behind the projection of the image tokens.
      text_activation, text_eps, embedding_eps: of the decoder's MLPs, of its norms, and of the text embedding's norm.
      dropout: in the decoder, in training.
      frames: 0 for images; else the frames of a clip, each with a learned vector.
      frame_pool: "concat" (all frames' tokens) or "mean" (over frames).
      max_side: 0 for square images; else images keep their aspect: short side `res`, long side at most this.
    """

    pool: str = "cls"
    activation: str = "quick_gelu"
    eps: float = 1e-5
    pre_norm: bool = True
    class_position: bool = True
    pixels: str = "clip"
    text: str = "w768d6h12m3072"
    vocab: int = 30_522
    start: int = 101
    length: int = 40
    text_positions: int = 1024
    tied: bool = True
    fusion: str = "prefix"
    norm: str = "post"
    projection_norm: bool = True
    text_activation: str = "gelu"
    text_eps: float = 1e-12
    embedding_eps: float = 1e-8
    dropout: float = 0.1
    frames: int = 0
    frame_pool: str = "concat"
    max_side: int = 0

    reads_start: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        size = sizes.parse_size(self.text)
        self.check_choices(fusion=("prefix", "cross"), norm=("post", "pre"), frame_pool=("concat", "mean"))
        if min(self.vocab, self.length, size.depth) < 1 or not 0 <= self.start < self.vocab:
            raise UserError("model: vocab and length must be at least 1, and start an id below vocab.")
        if self.length > self.text_positions:
            raise UserError(f"model.length={self.length} is more than model.text_positions={self.text_positions}.")
        if self.frames < 0 or not 0 <= self.dropout < 1:
            raise UserError("model.frames must not be negative, and model.dropout must be in [0, 1).")
        _, patch = sizes.parse(self.encoder)
        if self.max_side and (self.max_side < self.res or self.max_side % patch):
            raise UserError(
                f"model.max_side={self.max_side} should be a multiple of the patch {patch} and at least "
                f"model.res={self.res}."
            )
        if self.max_side and (self.frames or self.patch_dropout or self.positions != "learned"):
            raise UserError("model.max_side goes with images, learned positions and no patch dropout only.")
        if self.max_side and self.stem == "conv":
            raise UserError("model.max_side needs model.stem='patch': convolutions would read the padding.")

    @property
    def decoder_layers(self) -> int:
        """Depth of the decoder."""
        return sizes.parse_size(self.text).depth

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do. Its decoder reads a start, or a prompt, before it writes: not all at once."""
        return frozenset({Ability.IMAGES, Ability.DECODER} | ({Ability.CLIPS} if self.frames else set()))

    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image, or of a clip, as a batch has it."""
        if self.max_side:
            return (self.max_side, self.max_side, 4)
        return (*((self.frames,) if self.frames else ()), self.res, self.res, 3)

    def make(self, rngs: nnx.Rngs) -> "Git":
        """Builds the model."""
        return Git(self, rngs=rngs)


class ImageKeys(NamedTuple):
    """What the text attends to of each image: keys and values (layers, B, N, H, K), and which are real (1, B, N)."""

    keys: jax.Array
    values: jax.Array
    seen: jax.Array

    def mask(self, rows: int) -> jax.Array:
        """Which image tokens each of `rows` texts sees, (rows, 1, 1, N); consecutive texts share an image."""
        return jnp.repeat(self.seen[0], rows // self.seen.shape[1], axis=0)[:, None, None]


class GitBlock(nnx.Module):
    """x = LN(x + f(x)) ("post") or x + f(LN x) ("pre"); f is self-attention, cross-attention if there is one, MLP."""

    def __init__(self, size: Size, options: GitOptions, rngs: nnx.Rngs):
        self.post, self.dropout = options.norm == "post", options.dropout
        eps, init = dict(eps=options.text_eps, rngs=rngs), small(size.width)
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

            def look(x):
                q_BTHK = self.cross_attn.q(x)[:, :, 0]
                looked = self.cross_attn.out(attend_jointly(q_BTHK, [image], dropout=self.dropout, key=keys[1]))
                # A text without an image has nothing to look at, and a softmax over nothing would be even.
                return jnp.where(image[2].any(axis=(1, 2, 3))[:, None, None], looked, jnp.zeros((), looked.dtype))

            x_BLD = self._residual(self.cross_norm, x_BLD, look, keys[2])
        return constrain(self._residual(self.norm2, x_BLD, self.mlp, keys[3]), "batch", None, None)

    def prefix(self, x_BND, mask, key) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Image tokens, which see each other: their next states, and their keys and values."""
        keys, kept = _split(key, 5), []

        def attention(x):
            q, k, v = self.attn.project(x)
            kept.extend((k, v))
            if keys[4] is None:
                return self.attn.out(attend(q, k, v, mask=mask))
            return self.attn.out(attend_jointly(q, [(k, v, mask)], dropout=self.dropout, key=keys[4]))

        x_BND = self._run(x_BND, attention, None, keys)
        return x_BND, tuple(kept)

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
        kept = []

        def attention(x):
            q, *new, seen = self.attn.remember(x, cache, index)
            kept.extend(new)
            parts = [(*new, seen)] if self.cross_attn is not None else [image, (*new, seen)]
            return self.attn.out(attend_jointly(q, parts))

        x_R1D = self._run(x_R1D, attention, image, _split(None, 5))
        return x_R1D, tuple(kept)


def _split(key, count: int):
    return (None,) * count if key is None else jax.random.split(key, count)


class GitDecoder(nnx.Module):
    """Writes text behind image tokens; see `capvl.models.text_decoder.TextDecoder` for what is asked of a decoder.

    Id 0 is padding; the output layer is the token table with a bias (section 8 of BERT's code, arXiv 1810.04805), or,
    where `options.tied` is False, one of its own.
    """

    def __init__(self, options: GitOptions, *, rngs: nnx.Rngs):
        size, width = sizes.parse_size(options.text), sizes.parse(options.encoder)[0].width
        self.vocab, self.start, self.depth, self.length = options.vocab, options.start, size.depth, options.length
        self.heads, self.head_width = size.heads, size.width // size.heads
        self.crosses, self.dropout = options.fusion == "cross", options.dropout
        self.remat, self.unroll = options.remat, options.unroll
        init = small(size.width)
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
          encoded: tokens (B, N, D) of an encoder, or `Padded` ones.
          context_BC: int32 tokens of further text that joins the image's (such as what was read in it); 0 is padding.
          key: of the dropout, in training.
        """
        x = encoded.tokens if isinstance(encoded, Padded) else encoded
        seen = encoded.seen if isinstance(encoded, Padded) else jnp.ones(x.shape[:2], bool)
        x = self.project_image(x)
        if context_BC is not None:
            x = jnp.concatenate([x, self.embed(context_BC).astype(x.dtype)], axis=1)
            seen = jnp.concatenate([seen, real(context_BC)], axis=1)
        x = constrain(x, "batch", None, None)
        if self.crosses:
            kernel = self.cross_kv[...].astype(x.dtype)
            return ImageKeys(*(jnp.einsum("bnd,ydhk->ybnhk", x, kernel[:, :, c]) for c in (0, 1)), seen[None])
        whole = not isinstance(encoded, Padded) and context_BC is None
        mask = None if whole else seen[:, None, None]
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
            seen[None],
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
        seen = image_kv.mask(len(inputs_BL))

        def body(block, y, xs):
            return block.text(y, (*xs[:2], seen), mask, xs[2])

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
        seen = image_kv.mask(len(token_R))

        def layer(block, y, xs):
            keys, values, block_cache = xs
            return block.step(y, (keys, values, seen), block_cache, index)

        y, cache = scan_outputs(self.blocks, layer, y, (*image_kv[:2], cache))
        y = y if self.norm is None else self.norm(y)
        return self.project(y)[:, 0], cache


class Git(nnx.Module):
    """Images or clips -> tokens -> text. Every method is a pure function of the parameters."""

    def __init__(self, options: GitOptions, *, rngs: nnx.Rngs):
        self.dtype, self.frame_pool = jnp.dtype(options.dtype), options.frame_pool
        self.encoder = options.make_encoder(rngs)
        self.decoder = GitDecoder(options, rngs=rngs)
        width = sizes.parse(options.encoder)[0].width
        self.frames = weight(rngs, (options.frames, width), (None, None), weights.zeros) if options.frames else None

    def encode(self, image, *, key: jax.Array | None = None) -> Any:
        """Image tokens (B, N, D) of images (B, R, R, 3) or clips (B, F, R, R, 3) in [-1, 1]; a `key` means training.

        Images with a fourth channel (see `capvl.models.vit.ViT`) give `Padded` tokens. Clips have at most as many
        frames as the model.

        Raises:
          ValueError: more frames than the model has vectors for.
        """
        pixels = self.encoder.normalize(image.reshape(-1, *image.shape[-3:]))
        encoded = self.encoder(pixels, dtype=self.dtype, key=key)
        if image.ndim == 4:
            return encoded
        batch, frames = image.shape[:2]
        known = 0 if self.frames is None else len(self.frames[...])
        if frames > known:
            raise ValueError(f"a clip of {frames} frames for a model of {known}")
        encoded = encoded.reshape(batch, frames, *encoded.shape[1:])
        if self.frame_pool == "mean":
            return encoded.mean(axis=1)
        encoded = encoded + self.frames[...][:frames].astype(encoded.dtype)[None, :, None]
        return encoded.reshape(batch, -1, encoded.shape[-1])

    def features(self, image) -> jax.Array:
        """Pooled features (B, D) float32 of images; of clips the mean over frames."""
        flat = self.encode(image.reshape(-1, *image.shape[-3:]))
        tokens, seen = flat if isinstance(flat, Padded) else (flat, None)
        if seen is not None and self.encoder.pool_kind == "mean":
            weights_BN1 = seen[..., None].astype(tokens.dtype)
            pooled = (tokens * weights_BN1).sum(axis=1) / weights_BN1.sum(axis=1)
        else:
            pooled = self.encoder.pool(tokens)
        return pooled.reshape(image.shape[0], -1, pooled.shape[-1]).mean(axis=1).astype(jnp.float32)

    def logits(self, image, labels_BL) -> jax.Array:
        """Logits (B, L, V) float32 of `labels_BL`."""
        kv = self.decoder.image_kv(self.encode(image))
        return self.decoder.project(self.decoder.causal(labels_BL, kv, dtype=self.dtype))
