"""Pictures for people: boxes with their names drawn onto an image, and a map laid over it."""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = (
    (230, 60, 50), (40, 110, 220), (30, 150, 70), (240, 160, 20), (140, 70, 190),
    (0, 160, 170), (225, 80, 160), (120, 85, 60), (110, 130, 20), (70, 80, 100),
)  # fmt: skip
"""Of boxes, one after another."""
HEAT = np.array([(0, 0, 60), (70, 10, 140), (190, 40, 110), (240, 120, 30), (250, 250, 120)], np.float32)
"""From the lowest value of a map to its highest."""
SHORT = 224
"""The least short side of a picture that is enlarged."""
STRENGTH = 0.65
"""How much of the picture the map hides where it is highest."""


def enlarged(image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) whose short side is below SHORT, larger by a whole factor: so lines and names hide little."""
    factor = -(-SHORT // min(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_boxes(
    image: np.ndarray, boxes, labels: Sequence[str] = (), colors: Sequence[tuple[int, int, int]] | None = None
) -> np.ndarray:
    """(H, W, 3) uint8 with boxes and their names.

    Args:
      image: (H, W, 3) uint8.
      boxes: (N, 4) of (x0, y0, x1, y1) in fractions of the image.
      labels: a text of each box, cut to the image's width; () or "" for none.
      colors: of each box; None for COLORS in turn.

    Raises:
      ValueError: labels or colors are not as many as the boxes.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    labels = list(labels) or [""] * len(boxes)
    colors = [COLORS[i % len(COLORS)] for i in range(len(boxes))] if colors is None else list(colors)
    if not len(boxes) == len(labels) == len(colors):
        raise ValueError(f"{len(boxes)} boxes with {len(labels)} labels and {len(colors)} colors")
    height, width = image.shape[:2]
    picture = Image.fromarray(np.ascontiguousarray(image))
    pen, thick = ImageDraw.Draw(picture), max(1, round(min(height, width) / 160))
    corners = np.clip(boxes, 0, 1) * np.array([[width, height, width, height]])
    places = []
    for (x0, y0, x1, y1), color in zip(corners.round().astype(int).tolist(), colors, strict=True):
        x0, y0 = min(x0, width - 1), min(y0, height - 1)
        x1, y1 = max(x0, x1 - 1), max(y0, y1 - 1)
        pen.rectangle((x0, y0, x1, y1), outline=color, width=thick)
        places.append((x0, y0, y1))
    # Names come last: no box is drawn across one.
    taken: list[tuple[int, int, int, int]] = []
    for place, label, color in zip(places, labels, colors, strict=True):
        if label:
            _write(pen, place, label, color, (height, width), taken)
    return np.asarray(picture)


def _write(pen: ImageDraw.ImageDraw, place, label: str, color, size, taken) -> None:
    """A name on a plate at a box's upper left corner, inside the image: above it, in it or below, where none is yet."""
    (x, top, bottom), (height, width), font = place, size, _font(max(9, min(size) // 22))
    label = " ".join(label.split())
    while label and font.getlength(label) > width - 2:
        label = label[:-2] + "…" if len(label) > 2 else ""
    left, up, right, down = font.getbbox(label)
    wide, high = int(right - left) + 3, int(down - up) + 3
    x = max(0, min(x, width - wide))
    rows = [max(0, min(y, height - high)) for y in (top - high, top, top + high, bottom, top + 2 * high)]
    free = (y for y in rows if not any(_meet((x, y, x + wide, y + high), other) for other in taken))
    y = next(free, rows[0])
    taken.append((x, y, x + wide, y + high))
    pen.rectangle((x, y, x + wide - 1, y + high - 1), fill=color)
    white = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 160
    pen.text((x + 1 - left, y + 1 - up), label, fill=(255, 255, 255) if white else (0, 0, 0), font=font)


def _meet(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@functools.cache
def _font(size: int):
    return ImageFont.load_default(size)


def heat_map(image: np.ndarray, map_HW: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: an image under a map of values, such as Grad-CAM's, from the lowest (clear) to the highest.

    Args:
      image: (H, W, 3) uint8.
      map_HW: of any size; it is stretched over the image. One of a single value leaves the image clear.

    Raises:
      ValueError: the map is no matrix, or has values that are not finite.
    """
    values = np.asarray(map_HW, np.float32)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"a map should be a matrix of finite numbers, not of shape {values.shape}")
    low, high = float(values.min()), float(values.max())
    values = (values - low) / (high - low) if high > low else np.zeros_like(values)
    height, width = image.shape[:2]
    stretched = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
    heat = np.clip(np.asarray(stretched), 0, 1)
    steps = np.linspace(0, 1, len(HEAT))
    colored = np.stack([np.interp(heat, steps, HEAT[:, c]) for c in range(3)], axis=-1)
    share = STRENGTH * np.sqrt(heat)[..., None]
    return np.rint(image * (1 - share) + colored * share).astype(np.uint8)


def sheet(pictures: Sequence[np.ndarray], columns: int, gap: int = 6) -> np.ndarray:
    """Pictures (H, W, 3) uint8 of any sizes on one white page, in rows."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(sum(p.shape[1] + gap for p in row) for row in rows) + gap
    page = np.full((sum(max(p.shape[0] for p in row) + gap for row in rows) + gap, width, 3), 255, np.uint8)
    y = gap
    for row in rows:
        x = gap
        for picture in row:
            page[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
            x += picture.shape[1] + gap
        y += max(p.shape[0] for p in row) + gap
    return page
