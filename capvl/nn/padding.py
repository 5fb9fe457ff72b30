"""Where a text's tokens are: everything up to its last id that is not 0.

Texts end with an end id, which is not 0, and are padded with 0 behind it. So zeros at the end are padding, and zeros
before it are tokens: in CLIP's vocabulary id 0 is "!", in RoBERTa's the start of a text.
"""

import jax
import jax.numpy as jnp
import numpy as np


def lengths(text) -> np.ndarray | jax.Array:
    """Number of tokens (…,) int32 of int32 texts (…, L), their ends included."""
    numeric = jnp if isinstance(text, jax.Array) else np
    places = numeric.arange(1, text.shape[-1] + 1, dtype=np.int32).reshape((1,) * (text.ndim - 1) + (-1,))
    return numeric.where(text != 0, places, 0).max(axis=-1, initial=0)


def real(text) -> np.ndarray | jax.Array:
    """Which positions (…, L) of texts are tokens, bool."""
    numeric = jnp if isinstance(text, jax.Array) else np
    places = numeric.arange(text.shape[-1], dtype=np.int32).reshape((1,) * (text.ndim - 1) + (-1,))
    return places < lengths(text)[..., None]
