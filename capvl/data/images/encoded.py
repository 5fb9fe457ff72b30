"""Images as programs and people hold them -> encoded bytes, as an Example has them."""

import io
import os
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from capvl.errors import UserError

LARGEST_SIDE = 16_384


def encoded(image: Any) -> bytes:
    """Encoded bytes of an image; arrays and PIL images as PNG, without loss.

    Raises:
      UserError: not an image, or of a size or type that isn't known.
      BadImageError: it can't be read.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        file = pathlib.Path(image)
        if not file.is_file():
            if "://" in str(image):
                raise UserError(f"Image {str(image)!r} is an address; download it, and give its path or its bytes.")
            raise UserError(f"Image {str(image)!r} {'is no file' if file.exists() else 'does not exist'}.")
        return file.read_bytes()
    if isinstance(image, np.ndarray | jax.Array):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
            raise UserError(
                f"An image array should be uint8 of shape (H, W), (H, W, 3) or (H, W, 4), not {array.dtype} of "
                f"{array.shape}."
            )
        if not 0 < min(array.shape[:2]) <= max(array.shape[:2]) <= LARGEST_SIDE:
            raise UserError(
                f"An image of {array.shape[1]}x{array.shape[0]} pixels is out of range (1 to {LARGEST_SIDE})."
            )
        image = Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    if not isinstance(image, Image.Image):
        raise UserError(f"An image should be a PIL image, a uint8 array, bytes or a path, not {type(image).__name__}.")
    return _as_png(image)


def _as_png(image: Image.Image) -> bytes:
    """A PIL image upright, as a PNG that is read as the image is meant: 16 bits stay, transparency too.

    Raises:
      UserError: a mode whose values have no defined range, or that Pillow can't convert.
    """
    wide = image.mode == "I" and (image.getextrema()[0] < 0 or image.getextrema()[1] > 65535)
    if image.mode == "F" or wide:
        raise UserError(f"A PIL image of mode {image.mode!r} has no defined range of values; convert it to 8 bits.")
    image, buffer = ImageOps.exif_transpose(image), io.BytesIO()
    try:
        if image.mode in ("PA", "La", "RGBa"):
            image = image.convert("RGBA")
        elif image.mode == "I":  # As Pillow itself held grey values of 16 bits.
            image = Image.fromarray(np.asarray(image).astype(np.uint16))
        elif image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            image = image.convert("RGB")
        image.save(buffer, "PNG", compress_level=1)
    except (ValueError, OSError) as e:
        raise UserError(f"A PIL image of mode {image.mode!r} can't be read: {e}.") from e
    return buffer.getvalue()
