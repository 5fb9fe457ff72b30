"""Image encoder and text decoder joined: the model of Cap, Pa and CapPa (arXiv 2306.07915)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.errors import UserError, nearest
from capvl.models import sizes
from capvl.models.text_decoder import TextDecoder, shift_right
from capvl.models.vit import ViT
from capvl.nn.stack import REMAT


@dataclasses.dataclass(frozen=True)
class CaptionerOptions:
    """What a captioner is made of; `config.model` of a recipe.

    Attributes:
      encoder: SIZE/PATCH of the ViT (`capvl.models.sizes`).
      res: image side in pixels.
      pool: "mean", "map" or "cls".
      positions: "learned" or "sincos".
      registers, patch_dropout: see `capvl.models.vit.ViT`.
      decoder_layers: depth of the decoder, which has the encoder's width, heads and MLP.
      vocab: number of token ids.
      length: text positions.
      dtype: of activations and matmuls, "bfloat16" or "float32".
      remat: what the backward pass recomputes: "none", "dots", "named", "offload" or "full".
      unroll: straight-line layers instead of a loop.
    """

    encoder: str = "B/16"
    res: int = 224
    pool: str = "mean"
    positions: str = "learned"
    registers: int = 0
    patch_dropout: float = 0.0
    decoder_layers: int = 6
    vocab: int = 32_000
    length: int = 64
    dtype: str = "bfloat16"
    remat: str = "none"
    unroll: bool = False

    def __post_init__(self):
        _, patch = sizes.parse(self.encoder)
        if self.res < patch or self.res % patch:
            near = max(1, round(self.res / patch)) * patch
            raise UserError(f"model.res={self.res} is not a multiple of the patch {patch}; the nearest is {near}.")
        for name, known in (
            ("pool", ("mean", "map", "cls")),
            ("positions", ("learned", "sincos")),
            ("dtype", ("bfloat16", "float32")),
            ("remat", tuple(REMAT)),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"model.{name}={value!r} is unknown." + nearest(value, known))
        for name in ("decoder_layers", "vocab", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"model.patch_dropout must be in [0, 1), not {self.patch_dropout}.")

    def make(self, rngs: nnx.Rngs) -> "Captioner":
        """Builds the model."""
        return Captioner(self, rngs=rngs)


class Captioner(nnx.Module):
    """Images -> tokens -> text. Every method is a pure function of the parameters."""

    def __init__(self, options: CaptionerOptions, *, rngs: nnx.Rngs):
        size, patch = sizes.parse(options.encoder)
        self.dtype = jnp.dtype(options.dtype)
        self.encoder = ViT(
            size,
            patch,
            options.res,
            pool=options.pool,
            positions_kind=options.positions,
            registers=options.registers,
            patch_dropout=options.patch_dropout,
            remat=options.remat,
            unroll=options.unroll,
            rngs=rngs,
        )
        self.decoder = TextDecoder(
            dataclasses.replace(size, depth=options.decoder_layers),
            options.vocab,
            options.length,
            remat=options.remat,
            unroll=options.unroll,
            rngs=rngs,
        )

    def encode(self, image_BRRC, *, key: jax.Array | None = None) -> jax.Array:
        """Image tokens (B, N, D) of images (B, R, R, 3) in [-1, 1]; a `key` means training."""
        return self.encoder(image_BRRC, dtype=self.dtype, key=key)

    def features(self, image_BRRC) -> jax.Array:
        """Pooled features (B, D) float32."""
        return self.encoder.pool(self.encode(image_BRRC)).astype(jnp.float32)

    def hidden_causal(self, labels_BL, image_kv) -> jax.Array:
        """Decoder states (B, L, D) that predict `labels_BL` from the image and earlier tokens (Cap)."""
        return self.decoder(shift_right(labels_BL), image_kv, causal=True, dtype=self.dtype)

    def hidden_parallel(self, length: int, image_kv) -> jax.Array:
        """Decoder states (B, L, D) that predict every token from the image alone (Pa)."""
        return self.decoder.parallel(length, image_kv, dtype=self.dtype)

    def logits(self, image_BRRC, labels_BL, *, parallel: bool = False) -> jax.Array:
        """Logits (B, L, V) float32 of `labels_BL`, autoregressive or parallel."""
        kv = self.decoder.image_kv(self.encode(image_BRRC))
        hidden = self.hidden_parallel(labels_BL.shape[1], kv) if parallel else self.hidden_causal(labels_BL, kv)
        return self.decoder.project(hidden)
