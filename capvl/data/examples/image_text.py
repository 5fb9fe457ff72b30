"""Image-text pairs: an Example becomes arrays of fixed sizes, as a function of its own random numbers."""

import dataclasses

import numpy as np

from capvl.data.images.crops import Crop
from capvl.data.randomness import Uniforms
from capvl.data.text import tokenizers


@dataclasses.dataclass(frozen=True)
class ImageText:
    """image uint8 (R, R, 3), text int32 (L,), flip bool.

    Attributes:
      crop: how images become pixels.
      length: text length L.
      tokenizer: the tokenizer.
      flip: whether half of the training images are flipped (on the device).
      train: random crop, flip and caption; else the first caption and no randomness.
    """

    crop: Crop
    length: int
    tokenizer: tokenizers.Tokenizer
    flip: bool
    train: bool

    @classmethod
    def from_options(cls, data, *, res: int, length: int, train: bool, start: bool = True) -> "ImageText":
        """From `config.data` (`capvl.data.options.DataOptions`); start: of `capvl.data.text.tokenizers.load`."""
        crop = Crop.from_options(data, res=res, train=train)
        return cls(crop, length, tokenizers.load(data.tokenizer_path(), start), data.flip, train)

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used."""
        texts = example["text"]
        if self.train:
            text = texts[uniforms.below(len(texts))] if texts else ""
            flip = self.flip and uniforms() < 0.5
        else:
            text, flip = (texts[0] if texts else ""), False
        geometry = self.crop.draw(example, uniforms, flip=flip)
        return {
            "image": self.crop.pixels(example, uniforms, geometry, flip_on_device=True),
            "text": self.tokenizer(text, self.length),
            "flip": np.bool_(geometry.flip),
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
        """From `config.data` (`capvl.data.options.DataOptions`)."""
        return cls(length, tokenizers.load(data.tokenizer_path()))

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Draws the view and the caption."""
        texts, views = example["text"], example["embedding"]
        text = texts[uniforms.below(len(texts))] if texts else ""
        return {"embedding": views[uniforms.below(len(views))], "text": self.tokenizer(text, self.length)}
