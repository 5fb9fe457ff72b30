"""What a class head says of texts about images: entailed or not, true or false of a pair."""

from collections.abc import Sequence

import jax
import numpy as np

from capvl.errors import UserError
from capvl.inference.inputs import Images, Texts, as_list
from capvl.inference.loaded import Loaded
from capvl.models.abilities import Ability


def probabilities(model, rows) -> jax.Array:
    """Probabilities (B, c) float32 of the classes, of (images (B, M, R, R, 3), tokens (B, L))."""
    image_BMRRC, text_BL = rows
    return jax.nn.softmax(model.judge(image_BMRRC, text_BL[:, None])[:, 0])


# What follows is a method of `capvl.inference.face.LoadedModel`.


def judge(self: Loaded, images: Images | Sequence[Images], texts: Texts) -> list[tuple[str, dict[str, float]]]:
    """The class of each text with its image or pair of images, and the probabilities of all classes.

    Args:
      images: one or several; of a model for pairs a list of two, left and right, or a list of such lists.
      texts: one, or as many as images or pairs.

    Raises:
      UserError: the model has no class head, or there are not as many texts as images.
    """
    self.need(Ability.JUDGES)
    count, texts = self.options.images, as_list(texts)
    if count == 1:
        pixels = self.pixels(images)[:, None]
    else:
        nested = isinstance(images, list | tuple) and all(isinstance(pair, list | tuple) for pair in images)
        pairs = list(images) if nested else [images]
        if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == count for pair in pairs):
            raise UserError(f"The model {self.name!r} judges pairs: give a list of two images, or a list of such.")
        pixels = self.pixels([image for pair in pairs for image in pair])
        pixels = pixels.reshape(len(pairs), count, *pixels.shape[1:])
    if len(texts) not in (1, len(pixels)):
        what = "images" if count == 1 else "pairs"
        raise UserError(f"There are {len(texts)} texts for {len(pixels)} {what}; give one, or one for each.")
    tokens = np.broadcast_to(self.ids(texts), (len(pixels), self.options.length))
    found = self.run("judge", probabilities, (pixels, tokens))
    names = self.options.classes
    return [(names[int(row.argmax())], dict(zip(names, map(float, row), strict=True))) for row in found]
