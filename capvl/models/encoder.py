"""An image encoder by itself, as converted from other frameworks."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.models.vision import ImageOptions


@dataclasses.dataclass(frozen=True)
class EncoderOptions(ImageOptions):
    """An image encoder alone."""

    def make(self, rngs: nnx.Rngs) -> "ImageEncoder":
        """Builds the model."""
        return ImageEncoder(self, rngs=rngs)


class ImageEncoder(nnx.Module):
    """Images -> tokens -> pooled features."""

    def __init__(self, options: EncoderOptions, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(options.dtype)
        self.encoder = options.make_encoder(rngs)

    def encode(self, image_BHWC, *, key: jax.Array | None = None) -> jax.Array:
        """Image tokens (B, N, D) of images (B, H, W, 3) in [-1, 1]; a `key` means training."""
        return self.encoder(self.encoder.normalize(image_BHWC), dtype=self.dtype, key=key)

    def features(self, image_BHWC) -> jax.Array:
        """Pooled features (B, D) float32."""
        return self.encoder.pool(self.encode(image_BHWC)).astype(jnp.float32)
