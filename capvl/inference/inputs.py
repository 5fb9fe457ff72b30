"""What users bring to a model: images, clips and texts become pixels and tokens."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from capvl.data.images import video
from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError
from capvl.data.images.encoded import encoded
from capvl.data.randomness import Uniforms
from capvl.data.text import tokenizers
from capvl.errors import UserError

Images = Any
"""PIL images, uint8 arrays (H, W, 3) or (H, W), encoded bytes, paths, or lists of these."""
Texts = str | Sequence[str]


def pixels(crop: Crop, images: Images) -> np.ndarray:
    """uint8 (N, R, R, 3) of one image or several; see `Crop` for images that keep their aspect.

    Raises:
      UserError: there is none, or one can't be read.
    """
    several = images if isinstance(images, list | tuple) else [images]
    if isinstance(images, np.ndarray | jax.Array) and images.ndim == 4:
        several = list(images)
    if not several:
        raise UserError("There are no images.")
    crop, rows = dataclasses.replace(crop, frames=0), []
    for number, image in enumerate(several):
        try:
            rows.append(crop({"image": encoded(image)}, Uniforms(0, 0)))
        except BadImageError as e:
            raise UserError(f"Image {number} can't be used: {e}") from e
    return np.stack(rows)


def clips(crop: Crop, videos: Any) -> np.ndarray:
    """uint8 (N, F, R, R, 3) of one video or several, paths or bytes.

    Raises:
      UserError: there is none, or one can't be read or is too short.
    """
    several = videos if isinstance(videos, list | tuple) else [videos]
    if not several:
        raise UserError("There are no videos.")
    films = [[encoded(frame) for frame in video.read_frames(v, crop.frames)] for v in several]
    return np.stack([crop({"frames": film}, Uniforms(0, 0)) for film in films])


def as_list(texts: Texts) -> list[str]:
    """One text or several as a list.

    Raises:
      UserError: there is none, or one is empty or no text.
    """
    # The keys of a dict would pass for texts.
    listed = isinstance(texts, Iterable) and not isinstance(texts, Mapping)
    several = [texts] if isinstance(texts, str) else list(texts) if listed else []
    if not several or not all(isinstance(t, str) and t.strip() for t in several):
        raise UserError("Texts should be a text or a list of texts, none of them empty.")
    return several


def check_whole_number(name: str, value: Any, least: int) -> None:
    """Raises UserError where an argument is no whole number, or below `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name} should be a whole number of at least {least}, not {value!r}.")


def tokens(tokenizer, texts: Sequence[str], length: int, *, whole: bool = False) -> np.ndarray:
    """Tokens (N, L) int32 of texts.

    Args:
      tokenizer: of the model.
      texts: longer ones than L tokens are cut, as in training.
      length: L.
      whole: they are an error: names that are chosen among.
    """
    if whole:
        tokenizers.check_whole(tokenizer, texts, length)
    return np.stack([tokenizer(text, length) for text in texts])
