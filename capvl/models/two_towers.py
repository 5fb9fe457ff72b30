"""Image and text encoders with a joint space: CLIP (arXiv 2103.00020), LiT (2111.07991), SigLIP (2303.15343).

With `decoder_layers` the image encoder also feeds a captioning decoder, as in CoCa (2205.01917).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.errors import UserError
from capvl.models import flops, sizes
from capvl.models.abilities import Ability
from capvl.models.captioner import DecoderOptions
from capvl.models.text_tower import POOLS, TextTower
from capvl.models.vision import ImageOptions
from capvl.nn import weights
from capvl.nn.layers import ACTIVATIONS, Dense
from capvl.nn.weights import weight


@dataclasses.dataclass(frozen=True)
class TwoTowersOptions(DecoderOptions, ImageOptions):
    """What a two-tower model is made of; `config.model` of a recipe.

    Attributes:
      text: size of the text tower (`capvl.models.sizes`), such as "B".
      vocab, length: number of token ids, and text positions.
      text_pool: "last", "mean", "map", "argmax", "eos", "first" or "max"; see `capvl.models.text_tower`.
      text_end: id of the end of a text, at whose first place text_pool="eos" looks.
      text_activation, text_eps: of the text tower; "" and 0: as the image tower's.
      text_norm: "pre", or "post" as in BERT, which `init_from` can then give; see `capvl.models.text_tower`.
      text_causal: a token sees only those before it (CLIP).
      text_hides_padding: nobody sees padding.
      text_pad: id that the text tower reads for padding.
      projection: width of the joint space, to which both towers are projected; 0: the image's pooled
        feature is the joint space and only the text is projected, with a bias.
      projection_bias: whether the projections to a joint space have biases.
      temperature, bias: initial values of the learned scale (its inverse, as CLIP and SigLIP name it) and offset.
      decoder_layers: depth of a captioning decoder beside; 0 for none.
    """

    text: str = "B"
    vocab: int = 32_000
    length: int = 64
    text_pool: str = "last"
    text_end: int = 0
    text_activation: str = ""
    text_eps: float = 0.0
    text_norm: str = "pre"
    text_causal: bool = False
    text_hides_padding: bool = False
    text_pad: int = 0
    projection: int = 0
    projection_bias: bool = False
    temperature: float = 10.0
    bias: float = -10.0
    decoder_layers: int = 0

    def __post_init__(self):
        super().__post_init__()
        sizes.parse_size(self.text)
        self.check_choices(text_pool=POOLS, text_activation=("", *ACTIVATIONS), text_norm=("pre", "post"))
        if self.text_eps < 0:
            raise UserError(f"model.text_eps must not be negative, not {self.text_eps}.")
        if min(self.vocab, self.length) < 1 or min(self.projection, self.decoder_layers) < 0 or self.temperature <= 0:
            raise UserError(
                "model: vocab and length must be at least 1, projection and decoder_layers not negative, "
                "temperature above 0."
            )
        for name, value in (("text_pad", self.text_pad), ("text_end", self.text_end)):
            if not 0 <= value < self.vocab:
                raise UserError(f"model.{name}={value} is not an id below model.vocab={self.vocab}.")

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do."""
        decoder = {Ability.DECODER, Ability.PARALLEL} if self.decoder_layers else set()
        return frozenset({Ability.IMAGES, Ability.TEXTS} | decoder)

    @property
    def joint_width(self) -> int:
        """Width of the joint space."""
        return self.projection or self.encoder_width

    def text_tower_flops(self) -> float:
        """Forward matmul FLOPs of one text through the text tower, but of a MAP head."""
        size = sizes.parse_size(self.text)
        return size.depth * flops.layer(self.length, size) + flops.dense(1, size.width, self.joint_width)

    def make(self, rngs: nnx.Rngs) -> "TwoTowers":
        """Builds the model."""
        return TwoTowers(self, rngs=rngs)


def _image_head(width: int, options: TwoTowersOptions, rngs: nnx.Rngs) -> Dense:
    """The image's projection to the joint space."""
    bias = (options.projection,) if options.projection_bias else None
    shape, axes = (width, options.projection), ("embed", None)
    return Dense(shape, axes, weights.lecun_normal(width), bias=bias, rngs=rngs)


class TwoTowers(nnx.Module):
    """Images and texts -> vectors whose dot products say how well they fit."""

    def __init__(self, options: TwoTowersOptions, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(options.dtype)
        width = options.encoder_width
        self.encoder = options.make_encoder(rngs)
        self.image_head = _image_head(width, options, rngs) if options.projection else None
        self.text = TextTower(
            sizes.parse_size(options.text),
            options.vocab,
            options.length,
            options.joint_width,
            out_bias=not options.projection or options.projection_bias,
            pool=options.text_pool,
            end=options.text_end,
            norm=options.text_norm,
            causal=options.text_causal,
            hide_padding=options.text_hides_padding,
            pad=options.text_pad,
            activation=options.text_activation or options.activation,
            eps=options.text_eps or options.eps,
            remat=options.remat,
            unroll=options.unroll,
            rngs=rngs,
        )
        log_scale, bias = math.log(options.temperature), options.bias
        self.log_scale = weight(rngs, (1,), (None,), lambda key, shape: jnp.full(shape, log_scale, jnp.float32))
        self.bias = weight(rngs, (1,), (None,), lambda key, shape: jnp.full(shape, bias, jnp.float32))
        self.decoder = options.make_decoder(rngs) if options.decoder_layers else None

    def encode(self, image_BHWC, *, key: jax.Array | None = None) -> jax.Array:
        """Image tokens (B, N, D) of images (B, H, W, 3) in [-1, 1]; a `key` means training."""
        return self.encoder(self.encoder.normalize(image_BHWC), dtype=self.dtype, key=key)

    def features(self, image_BHWC) -> jax.Array:
        """Pooled features (B, D) float32, before the projection."""
        return self.encoder.pool(self.encode(image_BHWC)).astype(jnp.float32)

    def embed_tokens(self, encoded_BND) -> jax.Array:
        """Normalised embeddings (B, E) float32 of encoded images."""
        return self.embed_pooled(self.encoder.pool(encoded_BND))

    def embed_pooled(self, pooled_BD) -> jax.Array:
        """Normalised embeddings (B, E) float32 of pooled features."""
        return normalize(pooled_BD if self.image_head is None else self.image_head(pooled_BD))

    def embed_image(self, image_BHWC) -> jax.Array:
        """Normalised embeddings (B, E) float32 of images (B, H, W, 3) in [-1, 1]."""
        return self.embed_tokens(self.encode(image_BHWC))

    def embed_text(self, text_BL) -> jax.Array:
        """Normalised embeddings (B, E) float32 of int32 tokens, 0 being padding."""
        return normalize(self.text(text_BL, dtype=self.dtype))

    def scale(self) -> jax.Array:
        """The learned scale of the similarities, a float32 scalar."""
        return jnp.exp(self.log_scale[...].astype(jnp.float32))[0]

    def offset(self) -> jax.Array:
        """The learned bias of the sigmoid loss, a float32 scalar."""
        return self.bias[...].astype(jnp.float32)[0]


def normalize(x_BE) -> jax.Array:
    """x / (||x|| + 1e-8) in float32."""
    x_BE = x_BE.astype(jnp.float32)
    return x_BE / (jnp.linalg.norm(x_BE, axis=-1, keepdims=True) + 1e-8)
