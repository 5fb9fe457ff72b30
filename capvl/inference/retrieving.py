"""Search: the images that a text is about, or the texts that are about an image."""

from typing import Any

import numpy as np

from capvl.errors import UserError
from capvl.inference.inputs import Images, Texts, as_list, check_whole_number
from capvl.inference.loaded import Loaded
from capvl.inference.matching import image_vectors, match_pairs, text_vectors
from capvl.models.abilities import Ability

# What follows is a method of `capvl.inference.face.LoadedModel`.


def retrieve(
    self: Loaded, query: Any, *, images: Images = None, texts: Texts | None = None, top: int = 5, rerank: int = 0
) -> list[tuple[int, float]]:
    """The nearest images of a text, or the nearest texts of an image, best first.

    Args:
      query: a text where `images` are given, an image where `texts` are.
      images, texts: what is searched; one of the two.
      top: how many are wanted.
      rerank: so many of the nearest by cosine, and at least `top`, are scored by the matching head and ranked anew;
        0 for cosines alone.

    Returns:
      (index, score): the score is a cosine, or with `rerank` the matching head's.

    Raises:
      UserError: the model lacks what this needs, or both or none of `images` and `texts` are given.
    """
    self.need(Ability.TEXTS)
    if (images is None) == (texts is None):
        raise UserError("retrieve searches images=… for a text, or texts=… for an image; give one of the two.")
    check_whole_number("top", top, 1)
    check_whole_number("rerank", rerank, 0)
    if rerank:
        self.need(Ability.MATCHES)
    if images is not None and not isinstance(query, str):
        raise UserError(f"Images are searched for one text, not for {type(query).__name__}.")
    pixels, ids = self.pixels(query if images is None else images), self.ids(as_list(query if texts is None else texts))
    if images is None and len(pixels) != 1:
        raise UserError(f"Texts are searched for one image, not for {len(pixels)}.")
    cosines = self.run("embed", image_vectors, pixels) @ self.run("embed_text", text_vectors, ids).T
    scores = cosines.reshape(-1)
    order = np.argsort(-scores, kind="stable")[: max(top, rerank)]
    scores = scores[order]
    if rerank:
        one = np.zeros_like(order)
        scores = match_pairs(self, pixels, ids, *((one, order) if images is None else (order, one)))
        again = np.argsort(-scores, kind="stable")
        order, scores = order[again], scores[again]
    return [(int(i), float(s)) for i, s in zip(order[:top], scores[:top], strict=True)]
