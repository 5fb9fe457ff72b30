"""Image bytes -> upright uint8 RGB, JPEGs at reduced scale where the target is smaller.

libjpeg can decode at 1/8 … 8/8 scale for less work (DCT scaling); the smallest scale that still
covers the target is taken. Everything but plain JPEG goes through Pillow: CMYK, PNG, WebP, palettes with
transparency (onto white), 16 bits (scaled by the file's depth), animations (first frame).

There is one size of an image, the upright one: what EXIF says of its orientation is carried out before anything else.
"""

import io
import re

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from capvl.data.images.geometry import pixel_box

MAX_PIXELS = 120_000_000
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ORIENTATION = 0x0112
_ERRORS = (ValueError, OSError, SyntaxError, EOFError, IndexError, TypeError, Image.DecompressionBombError, Warning)


class BadImageError(ValueError):
    """The bytes are not an image that can be used; the message says why."""


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the upright image.

    Raises:
      BadImageError: not an image, or more than MAX_PIXELS.
    """
    height, width, _ = measure(data)
    return height, width


def measure(data: bytes) -> tuple[int, int, int]:
    """(height, width) of the upright image, and the orientation in which it is stored (`turn`).

    Raises:
      BadImageError: see `image_size`.
    """
    try:
        if _is_jpeg(data):
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            orientation = _jpeg_orientation(data)
        else:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                orientation = _orientation(image, data)
    except _ERRORS as e:
        raise BadImageError(f"not an image: {e}") from e
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{width}x{height} pixels are a decompression bomb (more than {MAX_PIXELS})")
    return (width, height, orientation) if orientation >= 5 else (height, width, orientation)


def _jpeg_orientation(data: bytes) -> int:
    """Orientation of a JPEG, from the headers before its pixels: of the EXIF block, else of the XMP block."""
    place, xmp = 2, b""
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker == 0xFF:  # A byte of filling.
            place += 1
            continue
        if marker == 0xDA:
            break
        if marker == 0xE1:
            block = data[place + 4 : place + 2 + size]
            if block.startswith(b"Exif\x00"):
                exif = Image.Exif()
                try:
                    exif.load(block)
                    return _valid(exif[_ORIENTATION])
                except Exception:  # Pillow has many errors for broken EXIF, which then says nothing.
                    pass
            xmp = xmp or block
        place += 2 + size
    said = re.search(rb'tiff:Orientation(?:="|>)(\d)', xmp)
    return _valid(int(said[1])) if said else 1


def _orientation(image: Image.Image, data: bytes) -> int:
    """Orientation of an image that Pillow opened; of a PNG only where it says anything, since that means decoding."""
    if image.format == "PNG" and not re.search(rb"eXIf|Raw profile type|tiff:Orientation", data):
        return 1
    try:
        return _valid(image.getexif().get(_ORIENTATION, 1)) if image.format != "TIFF" else 1  # Pillow turns TIFFs.
    except Exception:  # As for JPEG.
        return 1


def _valid(orientation) -> int:
    return orientation if orientation in range(1, 9) else 1


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (H, W, C) upright; orientation as EXIF has it (1 to 8)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def turn_boxes(boxes: np.ndarray, orientation: int) -> np.ndarray:
    """Boxes (N, 4) of (x0, y0, x1, y1), in fractions of the stored image, in the upright one: they go with `turn`."""
    x0, y0, x1, y1 = boxes.T
    if orientation in (5, 6, 7, 8):
        x0, y0, x1, y1 = y0, x0, y1, x1
    if orientation in (3, 4, 7, 8):
        y0, y1 = 1 - y1, 1 - y0
    if orientation in (2, 3, 6, 7):
        x0, x1 = 1 - x1, 1 - x0
    return np.stack([x0, y0, x1, y1], axis=1)


def decode(data: bytes, min_height: int = 0, min_width: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright.

    Args:
      data: encoded image.
      min_height, min_width: the result may be a reduced-scale version that is at least so large
        (or of full size where the image is smaller); 0 for full scale.

    Raises:
      BadImageError: truncated, not an image, too large, or without a defined range of values.
    """
    height, width, orientation = measure(data)
    if _is_jpeg(data):
        try:
            factor = _dct_factor(height, width, min_height, min_width)
            if factor == 1:
                return turn(simplejpeg.decode_jpeg(data), orientation)
            small = -(-height // factor), -(-width // factor)
            least = small[::-1] if orientation >= 5 else small
            return turn(
                simplejpeg.decode_jpeg(data, min_height=least[0], min_width=least[1], min_factor=1), orientation
            )
        except ValueError as e:
            if "truncated" in str(e).lower() or "premature" in str(e).lower():
                raise BadImageError(f"truncated JPEG: {e}") from e
    return turn(_decode_any(data, min_height, min_width), orientation)


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
    """As it is stored."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG" and min_height and min_width:
                image.draft(None, (max(min_height, min_width),) * 2)
            return _to_rgb(image)
    except BadImageError:
        raise
    except _ERRORS as e:
        raise BadImageError(f"undecodable image: {e}") from e


def _to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8; the range is that of the file's bit depth, whatever the values are."""
    # Pillow reads grey values of 16 bits as I;16, and some versions those of PNG and PGM as I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.clip(np.asarray(image).astype(np.float32) / 257, 0, 255)
        return np.repeat(np.rint(values).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise BadImageError(f"values of 32 bits (mode {image.mode}), whose range nothing defines")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def middle_square(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest central square of an image of a (height, width), as a box in fractions."""
    (height, width), square = size, min(size)
    x, y = (1 - square / width) / 2, (1 - square / height) / 2
    return x, y, 1 - x, 1 - y


def crop_and_resize(data: bytes, box: tuple[float, float, float, float] | None, side: int) -> np.ndarray:
    """Decodes, cuts out a box and resizes it to (side, side, 3) uint8.

    Args:
      data: encoded image.
      box: (x0, y0, x1, y1) as fractions of width and height; None for the largest central square.
      side: pixels.
    """
    x0, y0, x1, y1 = box = box or middle_square(image_size(data))
    pixels = decode(data, int(np.ceil(side / (y1 - y0))), int(np.ceil(side / (x1 - x0))))
    left, top, right, bottom = pixel_box(box, pixels.shape[:2])
    return resize(pixels[top:bottom, left:right], side, side)


def resize(pixels: np.ndarray, height: int, width: int, interpolation: str = "fast") -> np.ndarray:
    """(height, width, 3) uint8.

    Args:
      pixels: (H, W, 3) uint8.
      height, width: of the result.
      interpolation: "fast" (bilinear; area means where it shrinks to half or less), or one of PILLOW, widened where it
        shrinks: "bicubic" (CLIP, GIT, SigLIP) or "bilinear" (the first ViT).
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    if interpolation in PILLOW:
        return np.asarray(Image.fromarray(pixels).resize((width, height), PILLOW[interpolation]))
    # Bilinear reads two neighbours: enough below a factor of 2, aliased above it.
    shrinks = pixels.shape[0] >= 2 * height and pixels.shape[1] >= 2 * width
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def aspect_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """(height, width) of an image that keeps its aspect: short side `short`, or less where the long one would be longer
    than `longest` (GIT's code for question answering).
    """
    least, most = sorted((height, width))
    if short * most / least > longest:
        short = max(1, round(longest * least / most))
    other = int(short * most / least)
    return (short, other) if height <= width else (other, short)
