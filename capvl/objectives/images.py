"""What every objective does with images on the device."""

import jax
import jax.numpy as jnp


def unit_range(image, flip_B=None) -> jax.Array:
    """float32 images (B, R, R, 3) or clips (B, F, R, R, 3) in [-1, 1] of uint8 ones, flipped where `flip_B` says so;
    float images stay."""
    if image.dtype != jnp.uint8:
        return image
    if flip_B is not None:
        flip_B = flip_B.reshape(-1, *(1,) * (image.ndim - 1))
        image = jnp.where(flip_B, jnp.flip(image, axis=-2), image)
    return image.astype(jnp.float32) / 127.5 - 1.0
