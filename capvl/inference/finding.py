"""Boxes in images, of a list of classes or of the phrases of a caption, from a detector that reads what it looks for
(GLIP, arXiv 2112.03857)."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from capvl.data.examples.grounded import vocabulary
from capvl.data.images.decode import BadImageError, decode, image_size
from capvl.data.images.drawing import draw_boxes, enlarged
from capvl.data.images.encoded import encoded
from capvl.data.randomness import Uniforms
from capvl.data.text.noun_phrases import noun_phrases
from capvl.data.text.spans import class_weights, positive_map
from capvl.data.text.tokenizers import too_long
from capvl.errors import UserError, nearest
from capvl.inference import detecting, grounding
from capvl.inference.detecting import How, Prompts, Seen, bucket_of, buckets, prompts_of, states_of
from capvl.inference.inputs import Images, Texts, as_list, check_whole_number
from capvl.inference.loaded import Loaded
from capvl.models.abilities import Ability, abilities
from capvl.nn.anchors import STRIDES

TOGETHER = 8
"""Images that are looked at together at most."""
SURE = 0.3
"""The least score of a box, where none is given."""
LEAST_SLOTS = 128
"""Boxes of an image that are looked for at least, of which the best `most` are given."""


@dataclasses.dataclass(frozen=True, repr=False)
class Found:
    """What was found in an image, best first.

    Attributes:
      boxes: (M, 4) float32: (x0, y0, x1, y1) in fractions of the upright image.
      scores: (M,) float32 in 0 to 1.
      labels: names of the classes, or phrases.
      image: the encoded image.
      spans: of phrases: where the caption has each, (first character, end); () of classes.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: list[str]
    image: bytes
    spans: Sequence[tuple[int, int]] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        named = [f"{label} {score:.2f}" for label, score in zip(self.labels[:5], self.scores, strict=False)]
        return f"Found({', '.join(named + ['…'] * (len(self) > 5)) or 'nothing'})"

    def picture(self) -> Image.Image:
        """The upright image, enlarged where it is small, with the boxes, their labels and scores."""
        named = [f"{label} {score:.2f}" for label, score in zip(self.labels, self.scores, strict=True)]
        # The best is drawn last, above the others.
        drawn = draw_boxes(enlarged(decode(self.image)), self.boxes[::-1], named[::-1])
        return Image.fromarray(drawn)


# What follows are methods of `capvl.inference.face.LoadedModel`, but for those that begin with _, `ground_captions` and
# `too_small`.


def ground(self: Loaded, images: Images, texts: Texts, **how):
    """Where what texts name is in images.

    A detector (Ability.DETECTS) reads a caption for each image, and finds the boxes of its phrases: see
    `ground_captions`. Other models find one box for each phrase: see `capvl.inference.grounding.ground`.

    Raises:
      UserError: see there; or the model has no such option.
    """
    function = ground_captions if Ability.DETECTS in abilities(self.options) else grounding.ground
    known = set(inspect.signature(function).parameters) - {"self", "images"}
    for name in how:
        if name not in known:
            raise UserError(f"Grounding by {self.name!r} has no option {name!r}." + nearest(name, known))
    return function(self, images, texts, **how)


def detect(
    self: Loaded,
    images: Images,
    classes: Sequence[Any],
    *,
    threshold: float = SURE,
    most: int = 100,
    across: float = 0.0,
    prefix: str | None = None,
) -> Found | list[Found]:
    """Boxes of classes in images.

    Args:
      images: one or several.
      classes: names, or dicts with "name" and any of "said", "prefix", "suffix" and "description" (what a prompt says
        of a class). More than one text has room for become several; an image is encoded once for all.
      threshold: the least score, in 0 to 1.
      most: boxes of an image.
      across: not 0: of boxes with a larger IoU, whatever their classes, only the best stays.
      prefix: what stands before the classes, such as "object detection : "; None for what stood there in training.

    Returns:
      A `Found` for one image that is no list, else a list of them.

    Warns of classes that are the same for the model ("cat" and "Cat"), or of unknown words.

    Raises:
      UserError: the model detects nothing; an image can't be read, or is smaller than a stride; or the classes are
        none, named twice or too long.
    """
    self.need(Ability.DETECTS)
    _check(threshold, most, across)
    tokenizer = None if self.options.classes else self.tokenizer
    prefix = getattr(self.objective, "prefix", "") if prefix is None else prefix
    listed = vocabulary(self.options, tokenizer, classes, prefix=prefix)
    for doubt in listed.doubts():
        warnings.warn(doubt, stacklevel=2)
    asked = prompts_of(listed.prompts())
    names = [category.name for category in listed.categories]
    encode = self.compiled("text states", states_of)
    states = encode(self.params, asked.tokens_RPL)
    data = _encoded(images)
    found = _run(self, data, threshold, most, lambda chosen: (asked, states), across)
    return _given(images, data, found, [names] * len(data))


def ground_captions(
    self: Loaded,
    images: Images,
    captions: Texts,
    *,
    phrases: Sequence[Any] | None = None,
    threshold: float = SURE,
    most: int = 100,
) -> Found | list[Found]:
    """Boxes of what captions name in images.

    Args:
      images: one or several.
      captions: one for each image.
      phrases: of one caption: parts of it, as they stand there or as (first character, end); None for its noun phrases
        (`capvl.data.text.noun_phrases`).
      threshold, most: as for `detect`.

    Returns:
      A `Found` for one image and one caption that is no list, else a list of them.

    Raises:
      UserError: the model detects nothing, or reads no texts; an image can't be read, or is smaller than a stride;
        captions are not as many as images, too long, or name nothing, or a phrase is no part of its caption.
    """
    self.need(Ability.DETECTS)
    if self.options.classes:
        raise UserError(f"The model {self.name!r} has a closed list of classes and reads no captions.")
    _check(threshold, most)
    texts, data, length = as_list(captions), _encoded(images), self.options.length
    if len(texts) != len(data):
        raise UserError(f"There are {len(texts)} captions for {len(data)} images; give one for each image.")
    if phrases is not None and len(texts) > 1:
        raise UserError("phrases belong to one caption; ask for one image at a time.")
    if long := too_long(self.tokenizer, texts, length):
        raise UserError(f"The caption {long[0][:60]!r} has more than the {length} tokens that the model reads.")
    spans = [_spans(text) if phrases is None else _given_spans(text, phrases) for text in texts]
    columns = 1 << (max(map(len, spans)) - 1).bit_length()
    covered = [self.tokenizer.spans(text, length) for text in texts]
    tokens_NPL = np.stack([own.tokens for own in covered])[:, None]
    maps = [positive_map([[span] for span in own], said) for own, said in zip(spans, covered, strict=True)]
    for text, own, positive in zip(texts, spans, maps, strict=True):
        for (first, end), tokens in zip(own, positive, strict=True):
            if not tokens.any():
                raise UserError(f"No token of the caption {text[:60]!r} is of the phrase {text[first:end]!r}.")
    weights = [class_weights(positive, range(len(positive)), columns) for positive in maps]
    label_NPK = np.tile(np.arange(columns, dtype=np.int32), (len(texts), 1, 1))
    asked = Prompts(tokens_NPL, np.stack(weights)[:, None], label_NPK)

    def of_images(chosen):
        return jax.tree.map(lambda x: x[chosen], asked), None

    rows = _run(self, data, threshold, most, of_images)
    names = [[text[first:end] for first, end in own] for text, own in zip(texts, spans, strict=True)]
    return _given(images, data, rows, names, spans)


def _check(threshold: float, most: int, across: float = 0.0) -> None:
    for name, value in (("threshold", threshold), ("across", across)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"{name} should be a number from 0 to 1, not {value!r}.")
    check_whole_number("most", most, 1)


def _encoded(images: Images) -> list[bytes]:
    several = images if isinstance(images, list | tuple) else [images]
    if isinstance(images, np.ndarray | jax.Array) and images.ndim == 4:
        several = list(images)
    if not several:
        raise UserError("There are no images.")
    return [encoded(image) for image in several]


def _spans(caption: str) -> list[tuple[int, int]]:
    found = noun_phrases(caption)
    if not found:
        raise UserError(f"The caption {caption[:60]!r} has no noun phrase that could be looked for; give phrases=[…].")
    return found


def _given_spans(caption: str, phrases: Sequence[Any]) -> list[tuple[int, int]]:
    """Spans of phrases; of words that stand there several times the first that is no part of a longer word."""
    listed = [phrases] if isinstance(phrases, str) else list(phrases)
    found = [_span(caption, phrase) for phrase in listed]
    if not found:
        raise UserError("There are no phrases.")
    return found


def _span(caption: str, phrase: Any) -> tuple[int, int]:
    if isinstance(phrase, str) and phrase.strip():
        first = caption.find(phrase)
        while first >= 0:
            end = first + len(phrase)
            if not caption[max(0, first - 1) : first].isalnum() and not caption[end : end + 1].isalnum():
                return first, end
            first = caption.find(phrase, first + 1)
        raise UserError(f"The phrase {phrase!r} doesn't stand in the caption {caption[:60]!r}.")
    if isinstance(phrase, tuple | list) and len(phrase) == 2 and all(type(n) is int for n in phrase):
        first, end = phrase
        if 0 <= first < end <= len(caption):
            return first, end
    raise UserError(
        f"A phrase should be a part of the caption, or (first character, end) in its {len(caption)}, not {phrase!r}."
    )


def _run(
    self: Loaded,
    data: list[bytes],
    threshold: float,
    most: int,
    asked: Callable[[np.ndarray], tuple[Any, Any]],
    across: float = 0.0,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(boxes, scores, labels) of each image, `most` of scores above `threshold`; `asked` gives prompts and states for
    images by their numbers."""
    places, small = [], []
    for number, image in enumerate(data):
        try:
            places.append(bucket_of(self.options, image_size(image)))
            small += [number] * too_small(self, image)
        except BadImageError as e:
            raise UserError(f"Image {number} can't be used: {e}") from e
    if small:
        height, width = image_size(data[small[0]])
        raise UserError(
            f"Image {small[0]} of {width}x{height} pixels has a side that is smaller than the {STRIDES[0]} pixels from "
            "one place that the model looks at to the next."
        )
    found: list[Any] = [None] * len(data)

    # What users try one after another is compiled once: the threshold is an argument, and of `most` the next of few.
    slots = max(LEAST_SLOTS, 1 << (int(most) - 1).bit_length())
    how = How(most=slots, kept=slots, across=float(across))
    # A score is the root of a class score times centerness, which is below 1.
    least = np.float32(float(threshold) ** 2)

    def function(model, rows):
        *given, threshold = rows
        return detecting.detect(model, *given, how=how, threshold=threshold)

    call = self.compiled(("detect", how), function)
    for bucket in buckets(self.options):
        numbers = [number for number, place in enumerate(places) if place == bucket]
        seen = Seen(self.crop.in_bucket(bucket))
        for first in range(0, len(numbers), TOGETHER):
            own = numbers[first : first + TOGETHER]
            size = 1 << (len(own) - 1).bit_length()
            chosen = np.array(own + own[-1:] * (size - len(own)))
            rows = _stacked(seen, data, own, size)
            result = jax.device_get(call(self.params, (rows, *asked(chosen), least)))
            for row, number in enumerate(own):
                there = np.flatnonzero(result.valid_BM[row] & (result.score_BM[row] > threshold))[:most]
                values = result.box_BM4[row][there], result.score_BM[row][there], result.label_BM[row][there]
                if not np.isfinite(result.score_BM[row]).all():
                    raise UserError(f"The model {self.name!r} gives values that are not finite for image {number}.")
                found[number] = values
    return found


def too_small(self: Loaded, image: bytes) -> bool:
    """Whether a side of an image, as it is or as the model sees it, is smaller than the least stride.

    Raises:
      BadImageError: it is no image.
    """
    size = image_size(image)
    crop = self.crop.in_bucket(bucket_of(self.options, size))
    return min(*size, *crop.draw({"image": image}, Uniforms(0, 0)).resized) < STRIDES[0]


def _stacked(seen: Seen, data: list[bytes], numbers: list[int], size: int) -> dict[str, np.ndarray]:
    rows = []
    for number in numbers:
        try:
            rows.append(seen({"image": data[number]}, Uniforms(0, 0)))
        except BadImageError as e:
            raise UserError(f"Image {number} can't be used: {e}") from e
    rows += rows[-1:] * (size - len(rows))
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _given(images: Images, data, found, names, spans=None) -> Found | list[Found]:
    every = [
        Found(box, score, [own[label] for label in labels], image, [where[label] for label in labels] if spans else ())
        for (box, score, labels), own, image, where in zip(found, names, data, spans or names, strict=True)
    ]
    single = not isinstance(images, list | tuple) and len(data) == 1
    return every[0] if single else every
