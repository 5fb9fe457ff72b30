"""Zero-shot classification: the nearest prompt ensemble of two towers, or the likeliest text of a captioner."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from capvl.errors import UserError
from capvl.inference import matching, scoring
from capvl.inference.inputs import Images, as_list
from capvl.inference.loaded import Loaded
from capvl.models.abilities import Ability, abilities


def classify(
    self: Loaded, images: Images, names: Sequence[str], *, templates: str | Sequence[str] = "", top: int = 1
) -> list[Any]:
    """The name of each image: of a two-tower model the nearest prompt ensemble, of a captioner the likeliest text.

    Args:
      images: one or several.
      names: classes, at least two.
      templates: of prompts, with {} for the name; "" for the package's own (two towers), or the bare name.
      top: 1 for names; k for lists of the k best (name, score).
    """
    names, two_towers = as_list(names), Ability.TEXTS in abilities(self.options)
    if len(names) < 2 or len({n.casefold() for n in names}) < len(names):
        raise UserError("classify needs at least two names, each once.")
    if isinstance(templates, str):
        templates = matching.read_templates(templates) if templates or two_towers else ["{}"]
    scores = _by_prompts(self, images, names, templates) if two_towers else _by_texts(self, images, names, templates)
    order = np.argsort(-scores, axis=1)
    if top == 1:
        return [names[i] for i in order[:, 0]]
    return [[(names[i], float(row[i])) for i in best[:top]] for row, best in zip(scores, order, strict=True)]


def _by_prompts(model: Loaded, images: Images, names: list[str], templates: Sequence[str]) -> np.ndarray:
    prompts = matching.embed_text(model, [t.format(n) for n in names for t in templates])
    return matching.embed(model, images) @ matching.class_vectors(prompts, len(templates)).T


def _by_texts(model: Loaded, images: Images, names: list[str], templates: Sequence[str]) -> np.ndarray:
    model.need(Ability.DECODER)
    pixels = model.pixels(images)
    tokens = [model.ids([t.format(n) for n in names], whole=True) for t in templates]
    return np.logaddexp.reduce([scoring.every(model, pixels, t) for t in tokens]) - np.log(len(templates))
