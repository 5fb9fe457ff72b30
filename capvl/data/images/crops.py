"""Crops: the encoded image, or the frames of a clip, of an Example become pixels."""

import dataclasses
import math

import numpy as np

from capvl.data.images.decode import aspect_size, crop_and_resize, decode, image_size, resize
from capvl.data.randomness import Uniforms
from capvl.errors import UserError

MOST_PIXELS = 1 << 20


def resized_side(res: int, fraction: float) -> int:
    """Side to which an image is resized before its middle of `res` pixels is cut out."""
    return math.floor(res / fraction + 1e-6)


def random_crop(uniforms: Uniforms, size: tuple[int, int], scale, ratio) -> tuple[float, float, float, float]:
    """A box (x0, y0, x1, y1) in fractions, of an area in `scale` and an aspect ratio in `ratio`.

    Random-resized-crop of "Going deeper with convolutions" (arXiv 1409.4842), with the aspect
    drawn on a log scale; after ten boxes that don't fit, the largest central one that does.
    """
    height, width = size
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniforms())
        aspect = math.exp(log_low + (log_high - log_low) * uniforms())
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            x, y = uniforms() * (width - w) / width, uniforms() * (height - h) / height
            return x, y, x + w / width, y + h / height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, height * aspect), min(height, width / aspect)
    x, y = (1 - w / width) / 2, (1 - h / height) / 2
    return x, y, 1 - x, 1 - y


@dataclasses.dataclass(frozen=True)
class Crop:
    """How the encoded image (or the frames of a clip) of an Example becomes pixels.

    Attributes:
      res: side of the square, or the short side where images keep their aspect.
      kind: "random", "center", "center_floor", "squash" or "aspect".
      scale, ratio: area and aspect ranges of random crops.
      interpolation: "fast", "bilinear" or "bicubic"; see `capvl.data.images.decode.resize`.
      fraction: kinds "center" and "squash": the image is resized to the resolution divided by this, rounded down, and
        the middle cut out (`crop_pct` of timm).
      max_side: kind "aspect" only: the long side at most, and the side of the square that images are padded to.
      frames: 0 for images; else frames of a clip, all cropped alike.
      train: frames are drawn, one of each part of the clip; else the middle of each part.
    """

    res: int
    kind: str = "center"
    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    interpolation: str = "fast"
    fraction: float = 1.0
    max_side: int = 0
    frames: int = 0
    train: bool = False

    @classmethod
    def from_options(cls, data, *, res: int, train: bool, max_side: int = 0, frames: int = 0) -> "Crop":
        """From `config.data` (`capvl.data.options.DataOptions`)."""
        kind = data.crop if train or data.crop != "random" else "center"
        kind = "aspect" if max_side else kind
        interpolation, fraction = data.interpolation, data.crop_fraction
        return cls(res, kind, data.crop_scale, data.crop_ratio, interpolation, fraction, max_side, frames, train)

    @classmethod
    def of_model(cls, data, model_options, *, train: bool) -> "Crop":
        """From `config.data` and the options of a model."""
        extra = {name: getattr(model_options, name, 0) for name in ("max_side", "frames")}
        return cls.from_options(data, res=model_options.res, train=train, **extra)

    @property
    def feature(self) -> str:
        """The feature of an Example that is read."""
        return "frames" if self.frames else "image"

    def __call__(self, example: dict, uniforms: Uniforms) -> np.ndarray:
        """uint8 (R, R, 3); (M, M, 4) with 255 where the image is, for kind "aspect"; (F, R, R, 3) of a clip.

        Raises:
          BadImageError: the image can't be used.
          UserError: the clip has too few frames.
        """
        if not self.frames:
            return self._pixels(example["image"], self._box(example["image"], uniforms))
        frames = example["frames"]
        if len(frames) < self.frames:
            raise UserError(f"A clip has {len(frames)} frames, and the model reads {self.frames}.")
        box = self._box(frames[0], uniforms)
        return np.stack([self._pixels(frames[i], box) for i in self._chosen(len(frames), uniforms)])

    def blank(self) -> np.ndarray:
        """What stands for an image where there is none: zeros of the same shape."""
        if self.kind == "aspect":
            return np.zeros((self.max_side, self.max_side, 4), np.uint8)
        return np.zeros((*((self.frames,) if self.frames else ()), self.res, self.res, 3), np.uint8)

    def _chosen(self, count: int, uniforms: Uniforms) -> list[int]:
        bounds = [i * count / self.frames for i in range(self.frames + 1)]
        places = [uniforms() if self.train else 0.5 for _ in range(self.frames)]
        return [int(a + (b - a) * u) for a, b, u in zip(bounds, bounds[1:], places, strict=False)]

    def _box(self, data: bytes, uniforms: Uniforms):
        if self.kind == "random":
            return random_crop(uniforms, image_size(data), self.scale, self.ratio)
        return None

    def _pixels(self, data: bytes, box) -> np.ndarray:
        if self.kind == "aspect":
            return self._padded(decode(data))
        if self.interpolation == "fast":
            return crop_and_resize(data, box or self._middle(data), self.res)
        pixels = decode(data)
        height, width = pixels.shape[:2]
        if box is not None:
            x0, y0, x1, y1 = box
            left, top = min(int(x0 * width), width - 1), min(int(y0 * height), height - 1)
            cut = pixels[top : max(top + 1, round(y1 * height)), left : max(left + 1, round(x1 * width))]
            return resize(cut, self.res, self.res, self.interpolation)
        # The short side (or both) is resized and the middle cut out, with the roundings of torchvision or transformers.
        short = resized_side(self.res, self.fraction)
        height, width = (short, short) if self.kind == "squash" else aspect_size(height, width, short, MOST_PIXELS)
        pixels = resize(pixels, height, width, self.interpolation)
        half = math.floor if self.kind == "center_floor" else round
        top, left = half((height - self.res) / 2), half((width - self.res) / 2)
        return pixels[top : top + self.res, left : left + self.res]

    def _middle(self, data: bytes) -> tuple[float, float, float, float] | None:
        """The box of a crop that isn't drawn; None for the largest central square."""
        if self.kind == "squash":
            width = height = self.fraction
        elif self.fraction == 1:
            return None
        else:
            height, width = image_size(data)
            height, width = (self.fraction * min(height, width) / side for side in (height, width))
        return (1 - width) / 2, (1 - height) / 2, (1 + width) / 2, (1 + height) / 2

    def _padded(self, pixels: np.ndarray) -> np.ndarray:
        height, width = aspect_size(*pixels.shape[:2], self.res, self.max_side)
        # Rounding may make the long side one pixel longer, which no patch would hold.
        kept = resize(pixels, height, width, self.interpolation)[: self.max_side, : self.max_side]
        out = np.zeros((self.max_side, self.max_side, 4), np.uint8)
        out[: kept.shape[0], : kept.shape[1], :3] = kept
        out[: kept.shape[0], : kept.shape[1], 3] = 255
        return out
