"""Statements about one image or two, each with what holds of it: visual entailment, NLVR2.

An Example has `image`, or `images` (a list of two), and `questions` whose answer is the name of a class ("entailment",
"True"), so that several statements about the same images need them once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from capvl.data.examples.slots import choose, fill
from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError
from capvl.data.images.geometry import names_sides
from capvl.data.randomness import Uniforms
from capvl.data.reading.texts import questions
from capvl.data.text import tokenizers
from capvl.errors import UserError

FEATURES = ("image?", "images?", "questions")


@dataclasses.dataclass(frozen=True)
class Statements:
    """image uint8 (M, R, R, 3), flip bool (M,), text int32 (K, L), label int32 (K,), slots bool (K,): which of K
    statements are there.

    Attributes:
      crop: how each image becomes pixels.
      images: M.
      classes: names of what may hold of a statement; case doesn't matter.
      texts: K.
      length: L.
      tokenizer: of the statements.
      flip: whether half of the images are flipped (on the device). One image's statements follow it ("left" becomes
        "right"); a pair is flipped only where none of them names a side, which may be an image's or in an image.
      train: random crop, flip and statements; else the first ones and no randomness.
    """

    crop: Crop
    images: int
    classes: tuple[str, ...]
    texts: int
    length: int
    tokenizer: Any
    flip: bool
    train: bool

    @classmethod
    def from_options(cls, data, model_options, *, texts: int, train: bool) -> "Statements":
        """From `config.data` (`capvl.data.options.DataOptions`) and the options of the model."""
        crop = Crop.from_options(data, res=model_options.res, train=train)
        tokenizer = tokenizers.load(data.tokenizer_path(), model_options.reads_start)
        what = model_options.images, model_options.classes, texts, model_options.length
        return cls(crop, *what, tokenizer, data.flip, train)

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where an image can't be used or no statement has a label, UserError where there is
        another number of images or a label that is no class."""
        encoded = images_of(example, self.images)
        known = [q for q in questions(example["questions"]) if q.answers]
        if not known:
            raise BadImageError("no statement has a label")
        chosen = choose(known, self.texts, uniforms if self.train else None)
        flips = self._flips([q.question for q in chosen], uniforms)
        pixels = []
        for data, flip in zip(encoded, flips, strict=True):
            geometry = self.crop.draw({"image": data}, uniforms, flip=flip)
            pixels.append(self.crop.pixels({"image": data}, uniforms, geometry, flip_on_device=True))
        rows = []
        for question in chosen:
            # Of a pair that is flipped nothing names a side.
            text = geometry.text(question.question) if self.images == 1 else question.question
            label = class_of(question.answers[0], self.classes)
            rows.append({"text": self.tokenizer(text, self.length), "label": np.int32(label)})
        blank = {"text": np.zeros(self.length, np.int32), "label": np.int32(0)}
        return {"image": np.stack(pixels), "flip": np.array(flips)} | fill(rows, self.texts, blank)

    def _flips(self, texts: Sequence[str], uniforms: Uniforms) -> list[bool]:
        """Which images are flipped."""
        if not (self.train and self.flip) or (self.images > 1 and any(map(names_sides, texts))):
            return [False] * self.images
        return [uniforms() < 0.5 for _ in range(self.images)]


def images_of(example: dict, count: int) -> list[bytes]:
    """The encoded images of an Example.

    Raises:
      UserError: there are not as many.
    """
    found = list(example["images"]) if "images" in example else [example["image"]] if "image" in example else []
    if len(found) != count:
        raise UserError(f"An example has {len(found)} images, and model.images={count}.")
    return found


def class_of(answer: str, classes: Sequence[str]) -> int:
    """The number of the class that an answer names.

    Raises:
      UserError: it names none.
    """
    folded = [name.casefold() for name in classes]
    if answer.casefold() not in folded:
        raise UserError(f"The data has the answer {answer!r}, which is none of model.classes={tuple(classes)}.")
    return folded.index(answer.casefold())
