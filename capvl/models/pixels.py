"""What pixels are to an encoder: the mean and standard deviation that it was trained with."""

import jax
import jax.numpy as jnp

# Of pixels from 0 to 1.
PIXELS = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def normalize(image_BHWC, kind: str) -> jax.Array:
    """Images in [-1, 1] -> pixels of a kind, a key of PIXELS; a fourth channel stays."""
    if kind == "half":
        return image_BHWC
    mean, std = (jnp.asarray(row, image_BHWC.dtype)[None, None, None] for row in PIXELS[kind])
    return jnp.concatenate([(image_BHWC[..., :3] * 0.5 + 0.5 - mean) / std, image_BHWC[..., 3:]], axis=-1)
