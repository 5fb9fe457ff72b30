"""Phrase grounding by a detector: recall of the boxes that the phrases of captions name (Flickr30k Entities,
arXiv 1505.04870; GLIP, 2112.03857, section 4.2).

A caption is the prompt, and its phrases are the classes of it. Phrases that are said of boxes alone, as in RefCOCO or
the embedded scenes, are prompts by themselves, in images none of whose captions names a box.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from capvl.data.images.decode import decode, image_size
from capvl.data.images.drawing import enlarged
from capvl.data.reading import sources
from capvl.data.reading.regions import kinds, regions
from capvl.data.reading.sources import as_text
from capvl.data.text.spans import class_weights, positive_map
from capvl.errors import UserError
from capvl.evals import Context, Pictures, check_limits, found_boxes
from capvl.evals.average_precision import Found
from capvl.evals.boxes import to_show
from capvl.evals.phrase_recall import merged, place, recalls
from capvl.inference.compiled import compiled
from capvl.inference.detecting import How, Prompts, detect
from capvl.inference.grounding import picture
from capvl.models.abilities import Ability
from capvl.terminal import say

READ = ("text?", "objects?", "boxes?", "phrases?", "attributes?", "height?", "width?")
SHOWN = 16


@dataclasses.dataclass(frozen=True)
class PhraseBoxes:
    """Yields R@1, R@5, R@10 and R@all: the share of phrases with one of their boxes among the first so many that are
    found for them, with an IoU of at least 0.5; and of the kinds of phrases that a data set tells, such as
    `people/R@1`. `merged/…`: the same of the one box around all of a phrase's boxes. `phrases`: how many there are;
    `cut`: of them those behind the tokens that the model reads, which are not found. And `Pictures`.

    Attributes:
      name: data set with captions whose phrases have boxes, or with phrases of boxes; "" for the training set's, the
        first.
      split: of it.
      limit: images; 0 for all.
      most: boxes of a caption.
      kind, threshold, per_level, overlap: see `capvl.inference.detecting.How`.
    """

    name: str = ""
    split: str = "val"
    limit: int = 0
    most: int = 100
    kind: str = "mean"
    threshold: float = 0.05
    per_level: int = 1000
    overlap: float = 0.6

    def __post_init__(self):
        check_limits(self, "limit")
        self._how()

    def _how(self) -> How:
        return How(self.kind, self.threshold, self.per_level, self.overlap, self.most, 0)

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.DETECTS, "phrase_boxes")
        if context.model.classes:
            raise UserError("phrase_boxes needs a model that reads texts; this one has a closed list of classes.")
        name = self.name or context.data.parts()[0][0]
        source = found_boxes.opened(context, name, self.split)
        asked = read(source, self.split, context.tokenizer(), context.model.length, self.limit)
        how = self._how()

        def function(model, rows):
            prompts = Prompts(*(rows[key] for key in ("tokens", "weights", "label")))
            return detect(model, rows, prompts, how=how)

        find = compiled(context.blueprint, function)

        def evaluate(params):
            def of_batch(batch):
                return find(params, batch)

            found = found_boxes.run(context, source, asked.sizes, of_batch, asked.what, asked.row)
            boxes = asked.boxes(found)
            own = [phrase.kinds for phrase in asked.phrases]
            for prefix, true in (("", lambda right: right), ("merged/", merged)):
                pairs = zip(boxes, asked.phrases, strict=True)
                places = [place(found, true(phrase.boxes)) for found, phrase in pairs]
                yield from ((prefix + key, value) for key, value in recalls(places, own).items())
            yield "phrases", float(len(asked.phrases))
            yield "cut", float(asked.cut)
            yield "pictures", pictures(source, asked, boxes)

        return evaluate


class Phrase(NamedTuple):
    """A phrase of a caption: its image's number, the number that what is found for it has there, the text, its boxes
    (T, 4) in fractions, and of which kinds it is."""

    image: int
    label: int
    text: str
    boxes: np.ndarray
    kinds: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Captions and phrases of images.

    Attributes:
      what: they are, for messages.
      sizes: (I, 2) int, heights and widths of the images in pixels.
      phrases: in the images' order.
      captions: of each image: tokens (L,) and tokens of its phrases, bool (K, L), of each caption.
      most: captions of an image, and phrases of a caption, at most.
      cut: phrases without a token.
    """

    what: str
    sizes: np.ndarray
    phrases: list[Phrase]
    captions: list[list[tuple[np.ndarray, np.ndarray]]]
    most: tuple[int, int]
    cut: int

    def row(self, number: int) -> dict[str, np.ndarray]:
        """tokens (P, L), weights (P, L, K) and label (P, K) of an image (`capvl.inference.detecting.Prompts`); what
        stands where there are fewer captions asks for nothing."""
        texts, width = self.most
        own = self.captions[number]
        length = len(next(rows for rows in self.captions if rows)[0][0])
        tokens = np.zeros((texts, length), np.int32)
        weights, label = np.zeros((texts, length, width), np.float32), np.full((texts, width), -1, np.int32)
        for p in range(texts):
            # A text of padding alone would leave nothing to attend to.
            tokens[p] = own[p if p < len(own) else 0][0] if own else self._any()
            if p < len(own):
                positive = own[p][1]
                weights[p] = class_weights(positive, range(len(positive)), width)
                label[p, : len(positive)] = p * width + np.arange(len(positive))
        return {"tokens": tokens, "weights": weights, "label": label}

    def _any(self) -> np.ndarray:
        return next(rows for rows in self.captions if rows)[0][0]

    def boxes(self, found: Found) -> list[np.ndarray]:
        """Of each phrase its boxes (D, 4) in fractions, best first."""
        each = self.most[0] * self.most[1]
        key = found.image * each + found.label
        order = np.argsort(key, kind="stable")
        wanted = np.array([phrase.image * each + phrase.label for phrase in self.phrases])
        first, last = (np.searchsorted(key[order], wanted, side) for side in ("left", "right"))
        return [
            found_boxes.corners(found.box[order[a:b]], self.sizes[phrase.image])
            for a, b, phrase in zip(first, last, self.phrases, strict=True)
        ]


def read(source: sources.Source, split: str, tokenizer, length: int, limit: int = 0) -> Asked:
    """Captions of a source's images and their phrases that have boxes, or phrases that are said of boxes.

    Args:
      source: the opened data set.
      split: for messages.
      tokenizer: of the model.
      length: L.
      limit: the first so many images; 0 for all.

    Raises:
      UserError: no caption has a phrase with a box, and nothing is said of boxes.
    """
    what, count = f"{source.name!r}, split {split!r}", min(limit or len(source), len(source))
    sizes, spoken, cut = np.zeros((count, 2), int), [], 0
    captions: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for i, record in enumerate(source.annotations(READ, range(count))):
        size = int(record.get("height", 0)), int(record.get("width", 0))
        sizes[i] = size if all(size) else image_size(source.read(i, ("image",))["image"])
        named, of_kinds, own = _named(record), {span: own for (_, span), own in kinds(record).items()}, []
        for text, true in _said(record).items() if not named else ():
            covered = tokenizer.spans(text, length)
            spoken.append((i, len(own), 0, text, np.array(true), ()))
            own.append((covered.tokens, positive_map([[(0, len(text))]], covered)))
        for sentence in sorted({sentence for sentence, _, _ in named}):
            text = as_text(record["text"][sentence])
            spans = sorted((first, end) for n, first, end in named if n == sentence)
            covered = tokenizer.spans(text, length)
            positive = positive_map([[span] for span in spans], covered)
            cut += int((~positive.any(axis=1)).sum())
            for k, (first, end) in enumerate(spans):
                true = np.array(named[sentence, first, end])
                told = of_kinds.get((sentence, first, end), ())
                spoken.append((i, len(own), k, text[first:end], true, told))
            own.append((covered.tokens, positive))
        captions.append(own)
    if not spoken:
        raise UserError(f"Data set {what}, has no phrases with boxes, which phrase_boxes needs.")
    if cut:
        say(f"{cut} of {len(spoken)} phrases of {what} stand behind the {length} tokens that the model reads.")
    most = max(map(len, captions)), max(len(positive) for own in captions for _, positive in own)
    phrases = [Phrase(i, p * most[1] + k, *rest) for i, p, k, *rest in spoken]
    return Asked(what, sizes, phrases, captions, most, cut)


def _named(record) -> dict[tuple[int, int, int], list]:
    """(caption, first character, end) -> boxes of what it names; those without area are none."""
    named: dict[tuple[int, int, int], list] = {}
    texts = len(record.get("text", ()))
    for region in regions(record):
        x0, y0, x1, y1 = region.box
        for span in region.spans:
            if x0 < x1 and y0 < y1 and span[0] < texts:
                named.setdefault(span, []).append(region.box)
    return named


def _said(record) -> dict[str, list]:
    """Phrase -> the boxes that it is said of; those without area are none."""
    said: dict[str, list] = {}
    for region in regions(record):
        x0, y0, x1, y1 = region.box
        for phrase in dict.fromkeys(region.phrases) if x0 < x1 and y0 < y1 else ():
            said.setdefault(phrase, []).append(region.box)
    return said


def pictures(source: sources.Source, asked: Asked, boxes: list[np.ndarray]) -> Pictures:
    """SHOWN phrases, with the best box of each."""
    drawn, captions = [], []
    for number in to_show([phrase.image for phrase in asked.phrases], SHOWN):
        phrase, own = asked.phrases[number], boxes[number]
        pixels = enlarged(decode(source.read(phrase.image, ("image",))["image"]))
        found = own[0] if len(own) else np.zeros(4)
        drawn.append(picture(pixels, phrase.text if len(own) else "", found, true=phrase.boxes))
        at = place(own, phrase.boxes)
        captions.append(f"{phrase.text}: {'not found' if at < 0 else f'number {at + 1} is right'}")
    return Pictures(f"{asked.what}: green is right, red was found first", drawn, captions)
