"""Boxes that a detector found, from a file: JSON {image id: [[x, y, width, height, ...], ...]} in pixels.

The form of the dets.json that X-VLM's and MAttNet's code for RefCOCO reads.
"""

import numpy as np

from capvl.data.images.geometry import Size
from capvl.data.reading import lookup
from capvl.errors import UserError
from capvl.lines import read_json


def read(path: str) -> lookup.Names:
    """Boxes (D, 4) of x, y, width and height in pixels by the images' names.

    Raises:
      UserError: missing, or not of this form.
    """
    values = read_json(path, "The detections")
    if not isinstance(values, dict) or not values:
        raise UserError(f"The detections {path!r} should be a JSON object: image id -> boxes.")
    found = lookup.Names()
    for name, rows in values.items():
        if not isinstance(rows, list) or not rows or not all(_is_box(row) for row in rows):
            raise UserError(
                f"The detections {path!r} of image {name!r} should be one or more [x, y, width, height] in pixels, "
                "with a width and height above 0."
            )
        boxes = np.array([row[:4] for row in rows], np.float64)
        found.add(name, boxes)
    return found


def _is_box(row) -> bool:
    numbers = isinstance(row, list) and [
        v for v in row[:4] if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1 << 20
    ]
    return bool(numbers) and len(numbers) == 4 and min(numbers[2:]) > 0


def of_images(found: lookup.Names, path: str, names: list[list[str]], what: str) -> list[np.ndarray]:
    """The boxes of each image.

    Args:
      found: of `read`.
      path: of the file, for messages.
      names: that each image goes by; the first that the file has is taken.
      what: the images are, for messages.

    Raises:
      UserError: an image has none: they are of another split or another data set.
    """
    known, _ = found.find(name for own in names for name in own)
    lacking = [own for own in names if not any(name in known for name in own)]
    if lacking:
        raise UserError(
            f"The detections {path!r} lack {len(lacking)} of {len(names)} images of {what}, the first being "
            f"{lacking[0][0]!r}; they should be those of this split."
        )
    return [next(known[name] for name in own if name in known) for own in names]


def in_fractions(boxes: np.ndarray, size: Size, name: str) -> np.ndarray:
    """(x0, y0, x1, y1) in fractions of an image.

    Args:
      boxes: (D, 4) of x, y, width and height in pixels.
      size: (height, width) of the image.
      name: of the image, for messages.

    Raises:
      UserError: one lies outside, or reaches out by more than a twentieth of the image, as where the detector saw it at
        another size.
    """
    height, width = size
    outside = (boxes[:, 0] >= width) | (boxes[:, 1] >= height) | (boxes[:, :2] + boxes[:, 2:] <= 0).any(axis=1)
    if outside.any():
        box = boxes[outside][0].tolist()
        raise UserError(f"The detection {box} of image {name!r} lies outside of its {width}x{height} pixels.")
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    beyond = np.maximum(-corners, corners - np.array([width, height] * 2)) > np.array([width, height] * 2) / 20
    if beyond.any():
        box = boxes[beyond.any(axis=1)][0].tolist()
        raise UserError(
            f"The detection {box} of image {name!r} reaches far out of its {width}x{height} pixels; did the detector "
            f"see it at another size?"
        )
    return corners / np.array([[width, height, width, height]])
