"""Image bytes -> uint8 RGB, JPEGs at reduced scale where the target is smaller.

libjpeg can decode at 1/8 … 8/8 scale for less work (DCT scaling); the smallest scale that still
covers the target is taken. Everything but plain JPEG goes through Pillow: CMYK, EXIF-rotated,
PNG, WebP, palettes with transparency (onto white), 16 bits (scaled), animations (first frame).
"""

import io

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

cv2.setNumThreads(1)
Image.MAX_IMAGE_PIXELS = None  # `MAX_PIXELS` below is checked before anything is decoded.

MAX_PIXELS = 120_000_000


class BadImageError(ValueError):
    """The bytes are not an image that can be used; the message says why."""


def _is_plain_jpeg(data: bytes) -> bool:
    """A JPEG whose EXIF block, if any, is read by Pillow instead because it may rotate."""
    return data[:3] == b"\xff\xd8\xff" and b"Exif\x00" not in data[:4096]


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the stored pixels, before any EXIF rotation.

    Raises:
      BadImageError: not an image, or more than MAX_PIXELS.
    """
    try:
        if _is_plain_jpeg(data):
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        else:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
    except (ValueError, OSError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        raise BadImageError(f"not an image: {e}") from e
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{width}x{height} pixels are a decompression bomb (more than {MAX_PIXELS})")
    return height, width


def decode(data: bytes, min_height: int = 0, min_width: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright.

    Args:
      data: encoded image.
      min_height, min_width: the result may be a reduced-scale version that is at least so large
        (or of full size where the image is smaller); 0 for full scale.

    Raises:
      BadImageError: truncated, not an image, or too large.
    """
    if _is_plain_jpeg(data):
        height, width = image_size(data)
        try:
            factor = _dct_factor(height, width, min_height, min_width)
            if factor == 1:
                return simplejpeg.decode_jpeg(data)
            small = -(-height // factor), -(-width // factor)
            return simplejpeg.decode_jpeg(data, min_height=small[0], min_width=small[1], min_factor=1)
        except ValueError as e:
            if "truncated" in str(e).lower() or "premature" in str(e).lower():
                raise BadImageError(f"truncated JPEG: {e}") from e
    return _decode_any(data, min_height, min_width)


def _dct_factor(height: int, width: int, min_height: int, min_width: int) -> int:
    """1, 2, 4 or 8: the powers of two are what libjpeg-turbo has fast code for; 6/8 is slower than 8/8."""
    factor = 1
    while (
        factor < 8
        and min_height
        and min_width
        and height >= 2 * factor * min_height
        and width >= 2 * factor * min_width
    ):
        factor *= 2
    return factor


def _decode_any(data: bytes, min_height: int, min_width: int) -> np.ndarray:
    image_size(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG" and min_height and min_width:
                image.draft(None, (max(min_height, min_width),) * 2)
            image = ImageOps.exif_transpose(image)
            return _to_rgb(image)
    except (ValueError, OSError, SyntaxError, EOFError, IndexError, TypeError) as e:
        raise BadImageError(f"undecodable image: {e}") from e


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, np.float32)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        return np.repeat((np.clip(values / top, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def crop_and_resize(data: bytes, box: tuple[float, float, float, float] | None, side: int) -> np.ndarray:
    """Decodes, cuts out a box and resizes it to (side, side, 3) uint8.

    Args:
      data: encoded image.
      box: (x0, y0, x1, y1) as fractions of width and height; None for the largest central square.
      side: pixels.
    """
    height, width = image_size(data)
    if box is None:
        square = min(height, width)
        x, y = (1 - square / width) / 2, (1 - square / height) / 2
        box = (x, y, 1 - x, 1 - y)
    x0, y0, x1, y1 = box
    pixels = decode(data, int(np.ceil(side / (y1 - y0))), int(np.ceil(side / (x1 - x0))))
    height, width = pixels.shape[:2]
    left, top = min(int(x0 * width), width - 1), min(int(y0 * height), height - 1)
    right, bottom = max(left + 1, round(x1 * width)), max(top + 1, round(y1 * height))
    return resize(pixels[top:bottom, left:right], side, side)


def resize(pixels: np.ndarray, height: int, width: int, interpolation: str = "fast") -> np.ndarray:
    """(height, width, 3) uint8.

    Args:
      pixels: (H, W, 3) uint8.
      height, width: of the result.
      interpolation: "fast" (bilinear; area means where it shrinks to half or less) or "bicubic" (widened where it
        shrinks: Pillow's, with which CLIP and GIT were trained).
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    if interpolation == "bicubic":
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    # Bilinear reads two neighbours: enough below a factor of 2, aliased above it.
    shrinks = pixels.shape[0] >= 2 * height and pixels.shape[1] >= 2 * width
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def aspect_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """(height, width) of an image that keeps its aspect: short side `short`, or less where the long one would be longer
    than `longest` (GIT's code for question answering).
    """
    least, most = sorted((height, width))
    if short * most / least > longest:
        short = round(longest * least / most)
    other = int(short * most / least)
    return (short, other) if height <= width else (other, short)
