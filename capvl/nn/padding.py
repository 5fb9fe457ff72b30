"""Where a text's tokens are: everything up to its last id that is not 0.

Texts end with an end id, which is not 0, and are padded with 0 behind it. So zeros at the end are padding, and zeros
before it are tokens: in CLIP's vocabulary id 0 is "!", in RoBERTa's the start of a text.
"""

from types import ModuleType
from typing import Any

import numpy as np


def _numeric(array: Any) -> ModuleType:
    """NumPy, or JAX's for arrays on devices, which the host's side of the data doesn't import."""
    return np if isinstance(array, np.ndarray) else array.__array_namespace__()


def lengths(text) -> Any:
    """Number of tokens (…,) int32 of int32 texts (…, L), their ends included."""
    numeric = _numeric(text)
    places = numeric.arange(1, text.shape[-1] + 1, dtype=np.int32).reshape((1,) * (text.ndim - 1) + (-1,))
    return numeric.where(text != 0, places, 0).max(axis=-1, initial=0)


def real(text) -> Any:
    """Which positions (…, L) of texts are tokens, bool."""
    numeric = _numeric(text)
    places = numeric.arange(text.shape[-1], dtype=np.int32).reshape((1,) * (text.ndim - 1) + (-1,))
    return places < lengths(text)[..., None]
