"""Zero-shot classification: the nearest prompt ensemble of two towers, the likeliest text of a captioner, or the text
that a matching head finds right."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from capvl.errors import UserError, nearest
from capvl.inference import matching, scoring
from capvl.inference.inputs import Images, as_list, check_whole_number
from capvl.inference.loaded import Loaded
from capvl.models.abilities import Ability, abilities

WAYS = {"similarity": Ability.TEXTS, "likelihood": Ability.DECODER, "match": Ability.MATCHES}
"""What scores of classes are, and what they need."""


def classify(
    self: Loaded,
    images: Images,
    names: Sequence[str],
    *,
    templates: str | Sequence[str] = "",
    top: int = 1,
    by: str = "",
) -> list[Any]:
    """The name of each image: of a two-tower model the nearest prompt ensemble, of a captioner the likeliest text.

    Args:
      images: one or several.
      names: classes, at least two.
      templates: of prompts, with {} for the name; "" for the package's own (two towers), or the bare name.
      top: 1 for names; k for lists of the k best (name, score).
      by: "similarity" (two towers), "likelihood" (a captioner) or "match" (a matching head: the mean over templates);
        "" for the first of these that the model can do.
    """
    names = as_list(names)
    check_whole_number("top", top, 1)
    if not isinstance(by, str) or by not in ("", *WAYS):
        raise UserError(f"classify has no by={by!r}." + nearest(by, WAYS))
    by = by or next((way for way, ability in WAYS.items() if ability in abilities(self.options)), "likelihood")
    self.need(WAYS[by])
    if len(names) < 2 or len({n.casefold() for n in names}) < len(names):
        raise UserError("classify needs at least two names, each once.")
    if isinstance(templates, str):
        templates = matching.read_templates(templates) if templates or by == "similarity" else ["{}"]
    else:
        templates = matching.check_templates(as_list(templates))
    way = {"similarity": _by_prompts, "likelihood": _by_texts, "match": _by_matches}[by]
    scores = way(self, images, names, templates)
    order = np.argsort(-scores, axis=1)
    if top == 1:
        return [names[i] for i in order[:, 0]]
    return [[(names[i], float(row[i])) for i in best[:top]] for row, best in zip(scores, order, strict=True)]


def _by_prompts(model: Loaded, images: Images, names: list[str], templates: Sequence[str]) -> np.ndarray:
    prompts = matching.embed_text(model, [t.format(n) for n in names for t in templates])
    return matching.embed(model, images) @ matching.class_vectors(prompts, len(templates)).T


def _by_texts(model: Loaded, images: Images, names: list[str], templates: Sequence[str]) -> np.ndarray:
    pixels = model.pixels(images)
    tokens = [model.ids([t.format(n) for n in names], whole=True) for t in templates]
    return np.logaddexp.reduce([scoring.every(model, pixels, t) for t in tokens]) - np.log(len(templates))


def _by_matches(model: Loaded, images: Images, names: list[str], templates: Sequence[str]) -> np.ndarray:
    pixels = model.pixels(images)
    ids = model.ids([t.format(n) for n in names for t in templates], whole=True)
    pairs = np.indices((len(pixels), len(ids))).reshape(2, -1)
    scores = matching.match_pairs(model, pixels, ids, *pairs)
    return scores.reshape(len(pixels), len(names), len(templates)).mean(axis=2)
