"""Crops: the encoded image, or the frames of a clip, of an Example become pixels."""

import dataclasses
import math

import numpy as np

from capvl.data.images import randaugment
from capvl.data.images.buckets import Bucket, square
from capvl.data.images.decode import (
    BadImageError,
    aspect_size,
    crop_and_resize,
    decode,
    image_size,
    middle_square,
    resize,
)
from capvl.data.images.geometry import Box, Geometry, Size, mirrored
from capvl.data.randomness import Uniforms
from capvl.errors import UserError

MOST_PIXELS = 1 << 20


def resized_side(res: int, fraction: float) -> int:
    """Side to which an image is resized before its middle of `res` pixels is cut out."""
    return math.floor(res / fraction + 1e-6)


def random_crop(uniforms: Uniforms, size: Size, scale, ratio) -> Box:
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


def crop_around(uniforms: Uniforms, size: Size, box: Box) -> Box:
    """A box (x0, y0, x1, y1) in fractions that holds another, each side drawn between that one's and the image's.

    X-VLM (arXiv 2111.08276) crops so around one of an image's regions. Ends at whole pixels: nothing is cut off.
    """
    (height, width), (x0, y0, x1, y1) = size, (min(max(float(side), 0.0), 1.0) for side in box)
    left, top = x0 * uniforms(), y0 * uniforms()
    right, bottom = x1 + (1 - x1) * uniforms(), y1 + (1 - y1) * uniforms()
    return left, top, min(1.0, math.ceil(right * width) / width), min(1.0, math.ceil(bottom * height) / height)


def fitted_size(size: Size, short: int, bucket: Bucket) -> Size:
    """(height, width) of an image that keeps its aspect in a bucket: short side `short`, or less to fit in."""
    height, width = size
    across, along = (bucket.height, bucket.width) if height <= width else (bucket.width, bucket.height)
    return aspect_size(height, width, min(short, across), along)


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
      max_side: kind "aspect" only: the long side at most, in a bucket that has room for more, too; and the side of the
        square that images are padded to.
      frames: 0 for images; else frames of a clip, all cropped alike.
      train: frames are drawn, one of each part of the clip; else the middle of each part.
      bucket: kind "aspect" only: what images are padded to, by default the square of `max_side`.
      randaugment: of `capvl.data.images.randaugment.KINDS`.
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
    bucket: Bucket | None = None
    randaugment: str = ""

    @classmethod
    def from_options(cls, data, *, res: int, train: bool, max_side: int = 0, frames: int = 0) -> "Crop":
        """From `config.data` (`capvl.data.options.DataOptions`)."""
        kind = data.crop if train else data.still_crop
        kind = "aspect" if max_side else kind
        how = kind, data.crop_scale, data.crop_ratio, data.interpolation, data.crop_fraction, max_side, frames, train
        return cls(res, *how, randaugment=data.randaugment if train else "")

    @classmethod
    def of_model(cls, data, model_options, *, train: bool) -> "Crop":
        """From `config.data` and the options of a model."""
        extra = {name: getattr(model_options, name, 0) for name in ("max_side", "frames")}
        return cls.from_options(data, res=model_options.res, train=train, **extra)

    def in_bucket(self, bucket: Bucket) -> "Crop":
        """The crop to a bucket: images that keep their aspect are padded to it, others fill a square.

        Raises:
          ValueError: the bucket is no square, and images don't keep their aspect.
        """
        if self.kind == "aspect":
            return dataclasses.replace(self, bucket=bucket)
        if bucket.height != bucket.width:
            raise ValueError(f"a crop of kind {self.kind!r} fills squares, not {bucket}")
        return dataclasses.replace(self, res=bucket.height)

    @property
    def feature(self) -> str:
        """The feature of an Example that is read."""
        return "frames" if self.frames else "image"

    def __call__(self, example: dict, uniforms: Uniforms) -> np.ndarray:
        """Pixels by a description of their own, not flipped: see `draw` and `pixels`."""
        return self.pixels(example, uniforms, self.draw(example, uniforms))

    def draw(self, example: dict, uniforms: Uniforms, *, flip: bool = False, around: Box | None = None) -> Geometry:
        """What happens to the image, or to all frames of the clip, of an Example.

        Args:
          example: only its size is read here.
          uniforms: of the box, where the kind is "random"; then of RandAugment.
          flip: whether it is to be mirrored.
          around: kind "random" only: a box that stays whole (`crop_around`); `scale` and `ratio` then say nothing.

        Raises:
          BadImageError: the image can't be used.
          UserError: the clip has too few frames.
        """
        if self.frames and len(example["frames"]) < self.frames:
            raise UserError(f"A clip has {len(example['frames'])} frames, and the model reads {self.frames}.")
        geometry = self._placed(
            image_size(example["frames"][0] if self.frames else example["image"]), uniforms, flip, around
        )
        if not self.randaugment:
            return geometry
        tones, warp = randaugment.draw(self.randaugment, geometry.resized, uniforms)
        return dataclasses.replace(geometry, tones=tones, warp=warp)

    def _placed(self, size: Size, uniforms: Uniforms, flip: bool, around: Box | None) -> Geometry:
        if self.kind == "aspect":
            padded = self.bucket or square(self.max_side)
            room = Bucket(*(min(side, self.max_side) for side in padded))
            whole = fitted_size(size, self.res, room)
            # Rounding may make the long side one pixel longer, which no patch would hold.
            kept = min(whole[0], room.height), min(whole[1], room.width)
            return Geometry.resized_first(size, whole, (0, 0), kept, flip, padded)
        if self.kind != "random" and self.interpolation != "fast":
            whole, corner = self._middle_of_resized(size)
            return Geometry.resized_first(size, whole, corner, square(self.res), flip)
        if self.kind != "random":
            box = self._middle(size)
        elif around is not None:
            box = crop_around(uniforms, size, around)
        else:
            box = random_crop(uniforms, size, self.scale, self.ratio)
        return Geometry.cut_first(size, box, square(self.res), flip)

    def pixels(
        self, example: dict, uniforms: Uniforms, geometry: Geometry, *, flip_on_device: bool = False
    ) -> np.ndarray:
        """uint8 (R, R, 3); (H, W, 4) of the bucket, with 255 where the image is, for kind "aspect"; (F, R, R, 3) of a
        clip.

        Args:
          example: with the image or the frames.
          uniforms: of the frames, in training.
          geometry: what `draw` gave.
          flip_on_device: nothing is flipped here; see `capvl.objectives.images.unit_range`, which moves padding to the
            left, where `Geometry` doesn't have it: not for boxes in images of kind "aspect".

        Raises:
          BadImageError: the image can't be used.
        """
        flip = geometry.flip and not flip_on_device
        if not self.frames:
            return self._made(example["image"], geometry, flip)
        frames = example["frames"]
        return np.stack([self._made(frames[i], geometry, flip) for i in self._chosen(len(frames), uniforms)])

    def blank(self) -> np.ndarray:
        """What stands for an image where there is none: zeros of the same shape."""
        if self.kind == "aspect":
            return np.zeros((*(self.bucket or square(self.max_side)), 4), np.uint8)
        return np.zeros((*((self.frames,) if self.frames else ()), self.res, self.res, 3), np.uint8)

    def _chosen(self, count: int, uniforms: Uniforms) -> list[int]:
        bounds = [i * count / self.frames for i in range(self.frames + 1)]
        places = [uniforms() if self.train else 0.5 for _ in range(self.frames)]
        return [int(a + (b - a) * u) for a, b, u in zip(bounds, bounds[1:], places, strict=False)]

    def _middle(self, size: Size) -> Box:
        """The box of a crop that isn't drawn, cut out before it is resized."""
        if self.kind == "squash":
            width = height = self.fraction
        elif self.fraction == 1:
            return middle_square(size)
        else:
            height, width = (self.fraction * min(size) / side for side in size)
        return (1 - width) / 2, (1 - height) / 2, (1 + width) / 2, (1 + height) / 2

    def _middle_of_resized(self, size: Size) -> tuple[Size, Size]:
        """(height, width) that the image is resized to, and (top, left) of what is cut out of it then.

        The short side (or both) is resized, with the roundings of torchvision or transformers.
        """
        short = resized_side(self.res, self.fraction)
        whole = (short, short) if self.kind == "squash" else aspect_size(*size, short, MOST_PIXELS)
        if min(whole) < self.res:
            raise BadImageError(f"{size[1]}x{size[0]} pixels are too long and thin to fill {self.res}")
        half = math.floor if self.kind == "center_floor" else round
        return whole, (half((whole[0] - self.res) / 2), half((whole[1] - self.res) / 2))

    def _made(self, data: bytes, geometry: Geometry, flip: bool) -> np.ndarray:
        """The pixels of one image by its description."""
        if geometry.whole is None and self.interpolation == "fast":
            pixels = crop_and_resize(data, geometry.box, self.res)
        else:
            pixels = decode(data)
            if geometry.whole is not None:
                pixels = resize(pixels, *geometry.whole, self.interpolation)
            pixels = resize(pixels[geometry.cut(pixels.shape[:2])], *geometry.resized, self.interpolation)
        pixels, warp = (pixels[:, ::-1] if flip else pixels), geometry.warp
        if warp is not None and geometry.flip and not flip:  # It is flipped later.
            warp = mirrored(warp, geometry.resized[1])
        pixels = randaugment.apply(pixels, geometry.tones, warp)
        if self.kind != "aspect":
            return pixels
        out, (height, width) = np.zeros((*geometry.padded, 4), np.uint8), geometry.resized
        out[:height, :width, :3] = pixels
        out[:height, :width, 3] = 255
        return out
