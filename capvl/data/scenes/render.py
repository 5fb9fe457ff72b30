"""Scenes as pictures, drawn with OpenCV at twice the resolution and averaged down."""

import functools
import math

import cv2
import numpy as np

from capvl.data.scenes.world import COLORS, Scene, Thing

OVERSAMPLING = 2
_SHIFT = 4


def render(scene: Scene, side: int) -> np.ndarray:
    """(side, side, 3) uint8 RGB."""
    big = side * OVERSAMPLING
    rng = np.random.Generator(np.random.Philox(scene.noise_seed))
    slope = np.linspace(-18, 18, big, dtype=np.float32)
    if scene.noise_seed % 2:
        slope = slope[:, None]
    canvas = np.clip(np.broadcast_to(scene.background + slope, (big, big)), 0, 255).astype(np.uint8)
    canvas = np.ascontiguousarray(np.broadcast_to(canvas[:, :, None], (big, big, 3)))
    for thing in scene.things:
        _draw(canvas, thing, big)
    small = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)
    noise = rng.integers(0, 13, (side, side, 1), dtype=np.uint8)
    return cv2.subtract(cv2.add(small, np.repeat(noise, 3, axis=2)), (6.0, 6.0, 6.0, 0.0))


def encode_jpeg(image: np.ndarray, quality: int = 92) -> bytes:
    """JPEG bytes of an RGB image."""
    ok, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise RuntimeError("OpenCV could not encode a JPEG")
    return data.tobytes()


def _draw(canvas: np.ndarray, thing: Thing, side: int) -> None:
    color = COLORS[thing.color]
    if thing.word:
        _draw_word(canvas, thing, side, color)
        return
    outline = _outline(thing.shape) * thing.radius + np.array([thing.x, thing.y])
    points = np.round(outline * side * 2**_SHIFT).astype(np.int32)
    if thing.texture == "plain" and thing.shape != "ring":
        cv2.fillPoly(canvas, [points], color, cv2.LINE_AA, _SHIFT)
        return
    mask = np.zeros((side, side), np.uint8)
    cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, _SHIFT)
    if thing.shape == "ring":
        center = (round(thing.x * side), round(thing.y * side))
        cv2.circle(mask, center, round(thing.radius * side * 0.55), 0, -1, cv2.LINE_AA)
    x0, y0 = (max(0, int((c - thing.radius) * side) - 1) for c in (thing.x, thing.y))
    x1, y1 = (min(side, int((c + thing.radius) * side) + 2) for c in (thing.x, thing.y))
    dark = tuple(c // 3 for c in color)
    pattern = _pattern(thing.texture, side)[y0:y1, x0:x1, None]
    fill = np.where(pattern, np.uint8(dark), np.uint8(color))
    alpha = mask[y0:y1, x0:x1, None].astype(np.uint16)
    patch = canvas[y0:y1, x0:x1]
    canvas[y0:y1, x0:x1] = ((fill * alpha + patch * (255 - alpha)) // 255).astype(np.uint8)


@functools.cache
def _pattern(texture: str, side: int) -> np.ndarray:
    """(side, side) bool: where a texture is dark."""
    y, x = np.mgrid[:side, :side]
    unit = max(side // 24, 2)
    if texture == "striped":
        return (x + y) // unit % 2 == 0
    if texture == "checkered":
        return (x // unit + y // unit) % 2 == 0
    if texture == "dotted":
        period = 2 * unit
        return (x % period - unit) ** 2 + (y % period - unit) ** 2 < (0.75 * unit) ** 2
    return np.zeros((side, side), bool)


@functools.cache
def _outline(shape: str) -> np.ndarray:
    """Corners of a shape of radius 1 around the origin, (n, 2) of (x, y)."""
    if shape in ("circle", "ring"):
        return _polygon(40, 1.0)
    if shape == "star":
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)[:, None]
        return _polygon(10, 1.0, -math.pi / 2) * radii
    if shape == "cross":
        a = 0.36
        return np.array(
            [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
        )
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.88
    if shape == "triangle":
        return np.array([(0, -1), (1, 0.9), (-1, 0.9)])
    return _polygon({"diamond": 4, "hexagon": 6}[shape], 1.0, -math.pi / 2)


def _polygon(corners: int, radius: float, phase: float = 0.0) -> np.ndarray:
    angles = phase + 2 * np.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _draw_word(canvas, thing: Thing, side: int, color) -> None:
    """The word on a dark plate that fills the thing's box."""
    x0, y0, x1, y1 = (round(c * side) for c in thing.box)
    cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), (25, 25, 25), -1)
    face, thickness = cv2.FONT_HERSHEY_SIMPLEX, max(side // 64, 1)
    (width, height), _ = cv2.getTextSize(thing.word, face, 1.0, thickness)
    scale = min((x1 - x0) * 0.88 / width, (y1 - y0) * 0.62 / height)
    (width, height), _ = cv2.getTextSize(thing.word, face, scale, thickness)
    corner = ((x0 + x1 - width) // 2, (y0 + y1 + height) // 2)
    cv2.putText(canvas, thing.word, corner, face, scale, color, thickness, cv2.LINE_AA)
