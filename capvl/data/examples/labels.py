"""Images with labels: an Example becomes arrays of fixed sizes, as a function of its own random numbers."""

import dataclasses

import numpy as np

from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError
from capvl.data.randomness import Uniforms
from capvl.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageLabelTrain:
    """image uint8 (R, R, 3), label int32 (0 where none was asked for) and flip bool, for training a classifier.

    Attributes:
      crop: how images become pixels.
      classes: labels are below it.
      flip, train: as in `ImageText`.
    """

    crop: Crop
    classes: int
    flip: bool
    train: bool

    @classmethod
    def from_options(cls, data, *, res: int, classes: int, train: bool) -> "ImageLabelTrain":
        """From `config.data` (`capvl.data.options.DataOptions`)."""
        return cls(Crop.from_options(data, res=res, train=train), classes, data.flip, train)

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used or has no label, UserError where the label is none of the
        classes."""
        label = example.get("label", 0)
        if label == -1:
            raise BadImageError("it has no label")
        if not 0 <= label < self.classes:
            raise UserError(f"The data has the label {label}, and model.classes={self.classes}.")
        geometry = self.crop.draw(example, uniforms, flip=self.train and self.flip and uniforms() < 0.5)
        image = self.crop.pixels(example, uniforms, geometry, flip_on_device=True)
        return {"image": image, "label": np.int32(label), "flip": np.bool_(geometry.flip)}


@dataclasses.dataclass(frozen=True)
class ImageLabel:
    """image uint8 (or a clip; see `Crop`) and label int32 (-1: none); for evaluations."""

    crop: Crop

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used."""
        return {"image": self.crop(example, uniforms), "label": np.int32(example.get("label", -1))}
