"""Image encoder and text decoder joined: the model of Cap, Pa and CapPa (arXiv 2306.07915)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capvl.errors import UserError
from capvl.models import text_decoder
from capvl.models.abilities import Ability
from capvl.models.prompts import caption_prompt
from capvl.models.sizes import Size
from capvl.models.text_decoder import TextDecoder
from capvl.models.vision import ImageOptions


class DecoderOptions:
    """What options with `decoder_layers`, `vocab` and `length` tell of a decoder as wide as their encoder."""

    @property
    def decoder_size(self) -> Size:
        """The decoder's size: the encoder's, of `decoder_layers` layers."""
        return dataclasses.replace(self.encoder_size, depth=self.decoder_layers)

    @property
    def text_positions(self) -> int:
        """Positions that the decoder has."""
        return self.length

    def make_decoder(self, rngs: nnx.Rngs) -> TextDecoder:
        """Builds the decoder."""
        how = dict(remat=self.remat, unroll=self.unroll)
        return TextDecoder(self.decoder_size, self.vocab, self.length, **how, rngs=rngs)

    def prompt(self, tokenizer: Any, task: str, text: str = "") -> np.ndarray:
        """Tokens that begin what is written: none for a caption.

        Raises:
          UserError: another task.
        """
        return caption_prompt(task)

    def image_kv_flops(self) -> float:
        """Forward matmul FLOPs of one image's keys and values, which all its texts share."""
        return text_decoder.image_kv_flops(self.decoder_size, self.image_tokens())

    def text_flops(self, length: int = 0) -> float:
        """Forward matmul FLOPs of one text behind them, of `length` tokens; 0 for all."""
        return text_decoder.text_flops(self.decoder_size, self.vocab, length or self.length, self.image_tokens())

    def decoder_flops(self, texts: int = 1) -> float:
        """Forward matmul FLOPs of the decoder over one image and its texts."""
        return self.image_kv_flops() + texts * self.text_flops()


@dataclasses.dataclass(frozen=True)
class CaptionerOptions(DecoderOptions, ImageOptions):
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


class Captioner(nnx.Module):
    """Images -> tokens -> text. Every method is a pure function of the parameters."""

    def __init__(self, options: CaptionerOptions, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(options.dtype)
        self.encoder = options.make_encoder(rngs)
        self.decoder = options.make_decoder(rngs)

    def encode(self, image_BHWC, *, key: jax.Array | None = None) -> jax.Array:
        """Image tokens (B, N, D) of images (B, H, W, 3) in [-1, 1]; a `key` means training."""
        return self.encoder(self.encoder.normalize(image_BHWC), dtype=self.dtype, key=key)

    def features(self, image_BHWC) -> jax.Array:
        """Pooled features (B, D) float32."""
        return self.encoder.pool(self.encode(image_BHWC)).astype(jnp.float32)

    def logits(self, image_BHWC, labels_BL, *, parallel: bool = False) -> jax.Array:
        """Logits (B, L, V) float32 of `labels_BL`, autoregressive or parallel."""
        kv = self.decoder.image_kv(self.encode(image_BHWC))
        if parallel:
            return self.decoder.project(self.decoder.parallel(labels_BL.shape[1], kv, dtype=self.dtype))
        return self.decoder.project(self.decoder.causal(labels_BL, kv, dtype=self.dtype))
