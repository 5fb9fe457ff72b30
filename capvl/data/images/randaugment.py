"""RandAugment (arXiv 1909.13719) in X-VLM's way (arXiv 2111.08276): OPERATIONS times, with probability PROBABILITY, one
of ten operations at strength LEVEL of 10.

What is drawn is part of an image's `Geometry`, so that boxes and points follow. Operations that move pixels become one
affine map, which is carried out after those that change colours: what is moved twice is interpolated once, and what
left the image on the way comes back where the map says so. Strengths are those of X-VLM's code.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from capvl.data.images.geometry import Size, Warp, after, inverse
from capvl.data.randomness import Uniforms

OPERATIONS, LEVEL, PROBABILITY = 2, 7, 0.5
KINDS = ("", "photometric", "all")
FILL = (128, 128, 128)
"""What comes in from beyond the image's edges."""

_SHEAR, _TRANSLATE, _ROTATE = 0.3, 10.0, 30.0
"""At level 10: a share of the other side, pixels, degrees."""
_ENHANCE = LEVEL / 10 * 1.8 + 0.1

TONES = ("identity", "autocontrast", "equalize", "brightness", "sharpness")
MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def draw(kind: str, size: Size, uniforms: Uniforms) -> tuple[tuple[tuple[str, float], ...], Warp | None]:
    """(tones, warp) of a `Geometry`.

    Args:
      kind: of KINDS: "" for nothing, "photometric" for operations that leave boxes where they are.
      size: (height, width) of the resized image.
      uniforms: three of each operation are drawn.
    """
    names = {"": (), "photometric": TONES, "all": TONES + MOVES}[kind]
    tones, warp = [], None
    for _ in range(OPERATIONS if names else 0):
        name, taken, sign = names[uniforms.below(len(names))], uniforms() < PROBABILITY, 1 - 2 * (uniforms() < 0.5)
        if not taken or name == "identity":
            continue
        if name in TONES:
            tones.append((name, _ENHANCE if name in ("brightness", "sharpness") else 0.0))
        else:
            moved = move(name, sign * LEVEL / 10, size)
            warp = moved if warp is None else after(warp, moved)
    return tuple(tones), warp


def move(name: str, level: float, size: Size) -> Warp:
    """One of MOVES at a level in [-1, 1]; shears are about the top left corner, rotations about the middle."""
    if name == "shear_x":
        return 1.0, level * _SHEAR, 0.0, 0.0, 1.0, 0.0
    if name == "shear_y":
        return 1.0, 0.0, 0.0, level * _SHEAR, 1.0, 0.0
    if name == "translate_x":
        return 1.0, 0.0, level * _TRANSLATE, 0.0, 1.0, 0.0
    if name == "translate_y":
        return 1.0, 0.0, 0.0, 0.0, 1.0, level * _TRANSLATE
    turn, (y, x) = math.radians(level * _ROTATE), (size[0] / 2, size[1] / 2)
    c, s = math.cos(turn), math.sin(turn)
    return c, s, x - c * x - s * y, -s, c, y + s * x - c * y


def apply(pixels: np.ndarray, tones: tuple[tuple[str, float], ...], warp: Warp | None) -> np.ndarray:
    """(H, W, 3) uint8 -> the same shape: tones in order, then the warp, with FILL where nothing came from."""
    if not tones and warp is None:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    for name, strength in tones:
        if name == "autocontrast":
            image = ImageOps.autocontrast(image)
        elif name == "equalize":
            image = ImageOps.equalize(image)
        elif name == "brightness":
            image = ImageEnhance.Brightness(image).enhance(strength)
        else:
            image = ImageEnhance.Sharpness(image).enhance(strength)
    if warp is not None:
        image = image.transform(
            image.size, Image.Transform.AFFINE, inverse(warp), Image.Resampling.BILINEAR, fillcolor=FILL
        )
    return np.asarray(image)
