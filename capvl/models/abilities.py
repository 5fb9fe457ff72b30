"""What a model can do: a small closed set of words. Options say which they have; shared code asks for these alone."""

import enum
from typing import Any

from capvl.errors import UserError


class Ability(enum.StrEnum):
    """An ability, by the word that users read.

    Each stands for functions that the model then has (and its options, in brackets):
      IMAGES: `encode(images)`, `features(images)` [`image_shape()`].
      TEXTS: `embed_text(tokens)`, and `embed_image(images)` into the same space.
      DECODER: `decoder`, which writes and scores texts behind `decoder.image_kv(encode(images))`
        [`vocab`, `length`, `text_positions`, `prompt(tokenizer, task, text)`].
      ANSWERS: `ask(images, questions)`, behind which `decoder` writes answers and nothing else [as DECODER].
      PARALLEL: `decoder.parallel`: all tokens at once from the image alone (Pa).
      CLIPS: images are clips of `options.frames` frames.
      REGIONS: `regions(images, boxes, owners)`: boxes given, tokens of the regions that they hold.
      MATCHES: `match(encode(images), tokens)`: a score of each pair that looks at both sides at once; with `states`,
        `opened_match` and masks of regions as `capvl.models.xvlm.XVlm` has them [`cross_layers`, `grid`].
      DETECTS: `align(encode(images), states(tokens), tokens)`: boxes at many places, and how well each fits every token
        [`length`, `image_shape()`]; images have a fourth channel.
      BOXES: `locate(encode(images), tokens)`: where texts are in images.
      With TEXTS, what has MATCHES or REGIONS embeds what is encoded already: `embed_tokens(encode(images))`,
        `embed_states(states(tokens))`.
      CLASSIFIERS: the heads of a probe.
      JUDGES: `judge(images, tokens)`: which of `options.classes` what texts say of `options.images` images is.
    """

    IMAGES = "an image tower"
    TEXTS = "a text tower"
    DECODER = "a decoder"
    ANSWERS = "an answering head"
    PARALLEL = "parallel prediction (mode 'pa')"
    CLIPS = "clips"
    REGIONS = "regions"
    MATCHES = "a matching head"
    DETECTS = "a detection head"
    BOXES = "boxes"
    CLASSIFIERS = "classifiers"
    JUDGES = "a class head for images with texts"


READERS = frozenset(
    {Ability.TEXTS, Ability.DECODER, Ability.ANSWERS, Ability.MATCHES, Ability.DETECTS, Ability.BOXES, Ability.JUDGES}
)
"""Abilities of which each reads or writes texts."""


def abilities(options: Any) -> frozenset[Ability]:
    """Abilities of a model by its options; none where they say nothing of it, as those of one's own model may."""
    return frozenset(getattr(options, "abilities", ()))


def require(options: Any, who: str, *any_of: Ability) -> None:
    """Checks that a model has one of some abilities.

    Args:
      options: of the model.
      who: needs it, for the sentence ("The evaluator 'retrieval'").
      any_of: abilities, of which one suffices.

    Raises:
      UserError: it has none of them.
    """
    if not abilities(options) & set(any_of):
        raise UserError(f"{who} needs a model with {' or '.join(any_of)}, which this one doesn't have.")
