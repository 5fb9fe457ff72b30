"""Host-side transforms: an Example becomes fixed-size arrays, as a function of its own random numbers."""

import dataclasses
import math

import numpy as np

from capvl.data import tokenizer as tokenizers
from capvl.data.decode import crop_and_resize, image_size
from capvl.data.randomness import Uniforms
from capvl.errors import UserError


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


def cropped(data: bytes, res: int, crop: str, scale, ratio, uniforms: Uniforms) -> np.ndarray:
    """(res, res, 3) uint8 of an encoded image; crop is "random", "center" or "squash".

    Raises:
      BadImageError: the image can't be used.
    """
    if crop == "random":
        return crop_and_resize(data, random_crop(uniforms, image_size(data), scale, ratio), res)
    return crop_and_resize(data, (0.0, 0.0, 1.0, 1.0) if crop == "squash" else None, res)


@dataclasses.dataclass(frozen=True)
class ImageText:
    """image uint8 (R, R, 3), text int32 (L,), flip bool.

    Attributes:
      res, length: image side R and text length L.
      tokenizer: the tokenizer.
      crop: "random" (training only), "center" or "squash".
      scale, ratio: area and aspect ranges of random crops.
      flip: whether half of the training images are flipped (on the device).
      train: random crop, flip and caption; else the first caption and no randomness.
    """

    res: int
    length: int
    tokenizer: tokenizers.Tokenizer
    crop: str
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    train: bool

    @classmethod
    def from_options(cls, data, *, res: int, length: int, train: bool) -> "ImageText":
        """From `config.data` (`capvl.data.loader.DataOptions`)."""
        crop = data.crop if train or data.crop == "squash" else "center"
        tokenizer = tokenizers.load(data.tokenizer_path())
        return cls(res, length, tokenizer, crop, data.crop_scale, data.crop_ratio, data.flip, train)

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used."""
        texts = example["text"]
        if self.train:
            text = texts[uniforms.below(len(texts))] if texts else ""
            flip = self.flip and uniforms() < 0.5
        else:
            text, flip = (texts[0] if texts else ""), False
        return {
            "image": cropped(example["image"], self.res, self.crop, self.scale, self.ratio, uniforms),
            "text": self.tokenizer(text, self.length),
            "flip": np.bool_(flip),
        }


@dataclasses.dataclass(frozen=True)
class EmbeddingText:
    """embedding float16 (…), one of an image's cached views, and text int32 (L,), one of its captions.

    Attributes:
      length: text length L.
      tokenizer: the tokenizer.
    """

    length: int
    tokenizer: tokenizers.Tokenizer

    @classmethod
    def from_options(cls, data, *, length: int) -> "EmbeddingText":
        """From `config.data` (`capvl.data.loader.DataOptions`)."""
        return cls(length, tokenizers.load(data.tokenizer_path()))

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Draws the view and the caption."""
        texts, views = example["text"], example["embedding"]
        text = texts[uniforms.below(len(texts))] if texts else ""
        return {"embedding": views[uniforms.below(len(views))], "text": self.tokenizer(text, self.length)}


@dataclasses.dataclass(frozen=True)
class ImageLabelTrain:
    """image uint8 (R, R, 3), label int32 (0 where none was asked for) and flip bool, for training a classifier.

    Attributes:
      res: image side R.
      classes: labels are below it.
      crop, scale, ratio, flip, train: as in `ImageText`.
    """

    res: int
    classes: int
    crop: str
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    train: bool

    @classmethod
    def from_options(cls, data, *, res: int, classes: int, train: bool) -> "ImageLabelTrain":
        """From `config.data` (`capvl.data.loader.DataOptions`)."""
        crop = data.crop if train or data.crop == "squash" else "center"
        return cls(res, classes, crop, data.crop_scale, data.crop_ratio, data.flip, train)

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used, UserError where the label is none of the classes."""
        label = example.get("label", 0)
        if not 0 <= label < self.classes:
            raise UserError(f"The data has the label {label}, and model.classes={self.classes}.")
        flip = self.train and self.flip and uniforms() < 0.5
        image = cropped(example["image"], self.res, self.crop, self.scale, self.ratio, uniforms)
        return {"image": image, "label": np.int32(label), "flip": np.bool_(flip)}


@dataclasses.dataclass(frozen=True)
class ImageLabel:
    """image uint8 (R, R, 3), centrally cropped or squashed, and label int32 (-1: none); for evaluations."""

    res: int
    crop: str = "center"

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used."""
        box = (0.0, 0.0, 1.0, 1.0) if self.crop == "squash" else None
        return {"image": crop_and_resize(example["image"], box, self.res), "label": np.int32(example.get("label", -1))}
