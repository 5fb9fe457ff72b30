"""What happens to an image on its way to the model, said once: its pixels, boxes, points and words all follow.

An image is made upright, a box of it is kept, perhaps mirrored, resized, perhaps warped (RandAugment), and padded at
the right and below. Boxes are (x0, y0, x1, y1) and points (x, y), in fractions of the upright image in an Example and
of the model's image after it.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

Box = tuple[float, float, float, float]
Size = tuple[int, int]
Warp = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f) of the map (x, y) -> (a x + b y + c, d x + e y + f), in pixels whose first one has its middle at
0.5."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
"""The whole image."""

_OTHER = {"left": "right", "right": "left"}
_SIDE = re.compile(r"\b(left|right)(?=(?:most)?\b)", re.IGNORECASE)


def pixel_box(box: Box, size: Size) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels that are cut out for a box of an image of a (height, width)."""
    (x0, y0, x1, y1), (height, width) = box, size
    left, top = min(int(x0 * width), width - 1), min(int(y0 * height), height - 1)
    return left, top, max(left + 1, round(x1 * width)), max(top + 1, round(y1 * height))


def swap_sides(text: str | bytes) -> str | bytes:
    """The text of a mirrored image: "left" and "right" (also "leftmost", "left-hand") change places, their case stays.

    English only, and by the word alone: "right" in the sense of "correct" and "left" of "gone" are swapped too.
    """
    if isinstance(text, bytes):
        return swap_sides(text.decode()).encode()
    return _SIDE.sub(lambda found: _in_case_of(found[0], _OTHER[found[0].lower()]), text)


def swap_sides_with_spans(text: str, spans: Sequence[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a mirrored image, see `swap_sides`, and where spans of its characters, (first, end), have moved to.

    A span that begins or ends within a swapped word has all of it, as letters of it are none of the other word.
    """
    words = [found.span() for found in _SIDE.finditer(text)]
    swapped = swap_sides(text)

    def moved(place: int, *, end: bool) -> int:
        shift = 0
        for first, last in words:
            other = len(_OTHER[text[first:last].lower()])
            if first < place < last:
                return first + shift + (other if end else 0)
            if last <= place:
                shift += other - (last - first)
        return place + shift

    return swapped, [(moved(first, end=False), moved(last, end=True)) for first, last in spans]


def _in_case_of(said: str, word: str) -> str:
    return word.upper() if said.isupper() else word.capitalize() if said[0].isupper() else word


def names_sides(text: str | bytes) -> bool:
    """Whether a mirrored image would need another text: X-VLM (arXiv 2111.08276) doesn't flip those that name sides.

    Its code looks for the letters, also in "bright"; here it is the words of `swap_sides`.
    """
    return _SIDE.search(text.decode() if isinstance(text, bytes) else text) is not None


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What happens to one image, in this order.

    Attributes:
      upright: (height, width) of the upright image in pixels.
      box: what is kept of it, in fractions.
      resized: (height, width) in pixels that the kept box becomes.
      padded: (height, width) of the model's image: zeros at the right and below. As `resized` where nothing is padded.
      flip: whether it is mirrored, left to right; what is padded stays at the right.
      whole: (height, width) that the whole image is resized to before the box is cut out of it; None where the box is
        cut out first, at whole pixels.
      warp: where the resized (and mirrored) image's pixels go, in an image of its size; None: they stay.
      tones: operations that change colours only, with their strengths (`capvl.data.images.randaugment`).
    """

    upright: Size
    box: Box
    resized: Size
    padded: Size
    flip: bool = False
    whole: Size | None = None
    warp: Warp | None = None
    tones: tuple[tuple[str, float], ...] = ()

    @classmethod
    def cut_first(cls, upright: Size, box: Box, resized: Size, flip: bool = False) -> "Geometry":
        """The box is cut out and resized."""
        return cls(upright, box, resized, resized, flip)

    @classmethod
    def resized_first(
        cls, upright: Size, whole: Size, corner: Size, kept: Size, flip: bool = False, padded: Size | None = None
    ) -> "Geometry":
        """The image is resized to `whole`; of that, `kept` pixels are cut out from `corner` (top, left) on."""
        (top, left), (height, width) = corner, whole
        box = (left / width, top / height, (left + kept[1]) / width, (top + kept[0]) / height)
        return cls(upright, box, kept, padded or kept, flip, whole)

    def cut(self, size: Size) -> tuple[slice, slice]:
        """Rows and columns of the kept box in an image of a size: `whole`, or that of the decoded image."""
        if self.whole is None:
            left, top, right, bottom = pixel_box(self.box, size)
        else:
            left, top = (round(self.box[i] * self.whole[1 - i]) for i in (0, 1))
            right, bottom = left + self.resized[1], top + self.resized[0]
        return slice(top, bottom), slice(left, right)

    def _cut_box(self) -> Box:
        """The kept box as it is cut out."""
        if self.whole is not None:
            return self.box
        (left, top, right, bottom), (height, width) = pixel_box(self.box, self.upright), self.upright
        return left / width, top / height, right / width, bottom / height

    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """(factor, shift) of (x, y), each (1, 2): upright image -> model's image."""
        x0, y0, x1, y1 = self._cut_box()
        factor, shift = np.array([1 / (x1 - x0), 1 / (y1 - y0)]), np.array([-x0 / (x1 - x0), -y0 / (y1 - y0)])
        if self.flip:
            factor[0], shift[0] = -factor[0], 1 - shift[0]
        share = np.array([self.resized[1] / self.padded[1], self.resized[0] / self.padded[0]])
        return (factor * share)[None], (shift * share)[None]

    def boxes(self, boxes, share: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, 4) of the upright image in the model's image: float32 (N, 4), cut at what is kept, and bool (N,):
        which are still there; the others are zeros.

        The largest error is a pixel of the image as it was decoded, which may be at reduced scale.

        Args:
          boxes: (x0, y0, x1, y1) in fractions.
          share: a box is there where more than this share of its area is (X-VLM's is a half).
        """
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        x0, y0, x1, y1 = self._cut_box()
        inside = np.clip(boxes, np.array([[x0, y0, x0, y0]]), np.array([[x1, y1, x1, y1]]))
        moved, left = self._moved(inside, *self._scale()), np.ones(len(boxes))
        if self.warp is not None:
            moved, left = self._warped(moved)
        there = _area(inside) * left > share * _area(boxes)
        return np.where(there[:, None], moved, 0.0).astype(np.float32), there

    def _warped(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes around the warped corners of boxes of the model's image, cut at the resized image, and the share of
        each that is left (N,)."""
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
        warped = self._warp_points(corners, self.warp).reshape(-1, 4, 2)
        hull = np.concatenate([warped.min(axis=1), warped.max(axis=1)], axis=1)
        right, bottom = self.resized[1] / self.padded[1], self.resized[0] / self.padded[0]
        cut = np.clip(hull, 0.0, np.array([[right, bottom, right, bottom]]))
        return cut, _area(cut) / np.maximum(_area(hull), 1e-12)

    def _warp_points(self, points: np.ndarray, warp: Warp) -> np.ndarray:
        a, b, c, d, e, f = warp
        sides = np.array([[self.padded[1], self.padded[0]]], np.float64)
        return (points * sides @ np.array([[a, d], [b, e]]) + np.array([[c, f]])) / sides

    def points(self, points) -> tuple[np.ndarray, np.ndarray]:
        """Points (N, 2) of the upright image in the model's image: float32 (N, 2), and bool (N,): which are still
        there; the others are zeros."""
        points = np.asarray(points, np.float64).reshape(-1, 2)
        x0, y0, x1, y1 = self._cut_box()
        there = ((points >= np.array([[x0, y0]])) & (points <= np.array([[x1, y1]]))).all(axis=1)
        factor, shift = self._scale()
        moved = points * factor + shift
        if self.warp is not None:
            moved = self._warp_points(moved, self.warp)
            limit = np.array([[self.resized[1] / self.padded[1], self.resized[0] / self.padded[0]]])
            there &= ((moved >= 0) & (moved <= limit)).all(axis=1)
        return np.where(there[:, None], moved, 0.0).astype(np.float32), there

    def text(self, text: str | bytes) -> str | bytes:
        """A text about the image, of the model's image: see `swap_sides`."""
        return swap_sides(text) if self.flip else text

    def upright_boxes(self, boxes) -> np.ndarray:
        """The way back: boxes (N, 4) of the model's image in the upright image, float32 (N, 4), cut at its edges."""
        factor, shift = self._scale()
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        if self.warp is not None:
            corners = self._warp_points(boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2), inverse(self.warp))
            corners = corners.reshape(-1, 4, 2)
            boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        back = self._moved(boxes, 1 / factor, -shift / factor)
        return np.clip(back, 0.0, 1.0).astype(np.float32)

    def _moved(self, boxes, factor, shift) -> np.ndarray:
        """Scaled and shifted boxes, the smaller x first again."""
        corners = np.concatenate([boxes[:, :2] * factor + shift, boxes[:, 2:] * factor + shift], axis=1)
        return corners[:, [2, 1, 0, 3]] if self.flip else corners


def after(first: Warp, second: Warp) -> Warp:
    """The second warp of what the first one gave."""
    a, b, c, d, e, f = first
    g, h, i, j, k, m = second
    return g * a + h * d, g * b + h * e, g * c + h * f + i, j * a + k * d, j * b + k * e, j * c + k * f + m


def inverse(warp: Warp) -> Warp:
    """The way back."""
    a, b, c, d, e, f = warp
    size = a * e - b * d
    return e / size, -b / size, (b * f - c * e) / size, -d / size, a / size, (c * d - a * f) / size


def mirrored(warp: Warp, width: int) -> Warp:
    """The warp that, done to a mirrored image, gives the mirror image of what the warp gives."""
    mirror = (-1.0, 0.0, float(width), 0.0, 1.0, 0.0)
    return after(after(mirror, warp), mirror)


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)
