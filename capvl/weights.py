"""A model's parameters with what is needed to use them; read by `capvl.convert.folder`."""

import dataclasses
from typing import Any

import numpy as np

CHOICES = {
    "resize": ("big_vision", "hugging_face", "timm"),
    "crop": ("center", "center_floor", "squash"),
    "interpolation": ("fast", "bilinear", "bicubic"),
}
"""Values of Weights' attributes."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's parameters with what is needed to use them.

    Attributes:
      params: float32 by path.
      options: of the model.
      resize: how its positions are resized; see CHOICES.
      tokenizer: path of its tokenizer; "" where it has none.
      clean: how texts are cleaned for it, where the files beside it don't say; `capvl.data.text.cleaning.CLEANERS`.
      crop, crop_fraction, interpolation: how images are brought to its resolution; `capvl.data.images.crops.Crop`.
      objective: that it was trained with, for its prompts; None for what models of its kind usually have.
    """

    params: dict[str, np.ndarray]
    options: Any
    resize: str = "big_vision"
    tokenizer: str = ""
    clean: str = ""
    crop: str = "center"
    crop_fraction: float = 1.0
    interpolation: str = "fast"
    objective: Any = None
