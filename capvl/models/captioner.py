"""Image encoder and text decoder joined: the model of Cap, Pa and CapPa (arXiv 2306.07915)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.abilities import Ability
from capvl.models.text_decoder import TextDecoder
from capvl.models.vit import ViTOptions


@dataclasses.dataclass(frozen=True)
class CaptionerOptions(ViTOptions):
    """What a captioner is made of; `config.model` of a recipe.

    Attributes:
      decoder_layers: depth of the decoder, which has the encoder's width, heads and MLP.
      vocab: number of token ids.
      length: text positions.
    """

    decoder_layers: int = 6
    vocab: int = 32_000
    length: int = 64

    def __post_init__(self):
        super().__post_init__()
        for name in ("decoder_layers", "vocab", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do."""
        return frozenset({Ability.IMAGES, Ability.DECODER, Ability.PARALLEL})

    def make(self, rngs: nnx.Rngs) -> "Captioner":
        """Builds the model."""
        return Captioner(self, rngs=rngs)


def make_decoder(options, rngs: nnx.Rngs) -> TextDecoder:
    """The decoder of a model with `decoder_layers`, `vocab` and `length`, as wide as its encoder."""
    size, _ = sizes.parse(options.encoder)
    size = dataclasses.replace(size, depth=options.decoder_layers)
    return TextDecoder(size, options.vocab, options.length, remat=options.remat, unroll=options.unroll, rngs=rngs)


class Captioner(nnx.Module):
    """Images -> tokens -> text. Every method is a pure function of the parameters."""

    def __init__(self, options: CaptionerOptions, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(options.dtype)
        self.encoder = options.make_encoder(rngs)
        self.decoder = make_decoder(options, rngs)

    def encode(self, image_BRRC, *, key: jax.Array | None = None) -> jax.Array:
        """Image tokens (B, N, D) of images (B, R, R, 3) in [-1, 1]; a `key` means training."""
        return self.encoder(self.encoder.normalize(image_BRRC), dtype=self.dtype, key=key)

    def features(self, image_BRRC) -> jax.Array:
        """Pooled features (B, D) float32."""
        return self.encoder.pool(self.encode(image_BRRC)).astype(jnp.float32)

    def logits(self, image_BRRC, labels_BL, *, parallel: bool = False) -> jax.Array:
        """Logits (B, L, V) float32 of `labels_BL`, autoregressive or parallel."""
        kv = self.decoder.image_kv(self.encode(image_BRRC))
        if parallel:
            return self.decoder.project(self.decoder.parallel(labels_BL.shape[1], kv, dtype=self.dtype))
        return self.decoder.project(self.decoder.causal(labels_BL, kv, dtype=self.dtype))
