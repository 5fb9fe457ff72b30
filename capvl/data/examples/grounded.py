"""Images with boxes, and a text that names them: what GLIP is trained on (arXiv 2112.03857, section 3.1).

The text is a caption some of whose phrases have boxes, or a prompt that the names of classes make. Each box has the
tokens of its phrases or of its class; an image without boxes has a text all of whose tokens are wrong.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from capvl.data.examples.phrases import SIDES
from capvl.data.examples.slots import choose, fill
from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError
from capvl.data.images.geometry import Geometry, names_sides, swap_sides_with_spans
from capvl.data.randomness import Uniforms
from capvl.data.reading.regions import Region, crowds, looked_for, regions
from capvl.data.reading.sources import Source, as_text
from capvl.data.text import packing
from capvl.data.text.category_prompts import NEGATIVES, SEPARATOR, Prompt, Vocabulary, clean_name, sampled_prompt
from capvl.data.text.closed_list import ClosedList
from capvl.data.text.spans import positive_map
from capvl.errors import UserError, nearest
from capvl.nn.padding import lengths

TEXTS = ("captions", "classes", "phrases")
"""What the text of an example may be made of: a caption with the spans that name boxes; names of classes; phrases that
are said of boxes alone, as a prompt without others."""
ORDERS = ("sampled", "fixed")


@dataclasses.dataclass(frozen=True)
class Texts:
    """How an example gets its text.

    Attributes:
      kinds: of TEXTS; an example has one that it has the boxes for, drawn at every visit.
      order: of classes: "sampled": an image's own and others, in random order; "fixed": all, in the data set's.
      negatives: sampled only: other classes at most.
      full: sampled only: how often there are so many; else their number is uniform in 1..negatives.
      prefix: what stands before classes.
      packed: other captions, at most, that stand around one as negatives.
      signs: whether tokens without a letter or digit count: the start, the end, and what stands between classes. No box
        has them, so where they count they are what nothing is ("MASK_SPECIAL" of the official code leaves them out).
      sides: what becomes of a flip where the text names a side: "skip" leaves the flip out, "swap" swaps the words, but
        for those of classes: what is mirrored is another class.
    """

    kinds: tuple[str, ...] = ("captions", "classes")
    order: str = "sampled"
    negatives: int = NEGATIVES
    full: float = 0.5
    prefix: str = ""
    packed: int = 0
    signs: bool = True
    sides: str = "skip"


@dataclasses.dataclass(frozen=True)
class Captions:
    """Captions of data sets, one drawn after another.

    Attributes:
      sources: opened with their captions.
    """

    sources: tuple[Source, ...]

    def __call__(self, uniforms: Uniforms, count: int) -> list[str]:
        """So many captions of images; fewer where one that is drawn has none."""
        found = []
        for _ in range(count):
            source = self.sources[uniforms.below(len(self.sources))]
            said = source.read(uniforms.below(len(source)), ("text",))["text"]
            found += [as_text(said[uniforms.below(len(said))])] if said else []
        return found


@dataclasses.dataclass(frozen=True)
class GroundedText:
    """image uint8 (H, W, 4), text int32 (L,), counted bool (L,): the tokens that are learned, and of S slots box
    float32 (S, 4), slots bool (S,) and positive bool (S, L): the tokens of each box. left int32: boxes for which no
    slot, or no room in the text, was left.

    Attributes:
      crop: how images become pixels; they are flipped here.
      tokenizer: of the texts.
      length: L.
      slots: S.
      flip: whether half of the images are flipped.
      train: random flip and text; else the first and no randomness.
      texts: how an example gets its text.
      vocabularies: the closed lists of classes of data sets, by their names; of a model without a text encoder
        `ClosedList`s. An Example has the names of its own as `classes`.
      captions: of other images; None where none are packed.
    """

    crop: Crop
    tokenizer: Any
    length: int
    slots: int
    flip: bool
    train: bool
    texts: Texts
    vocabularies: Mapping[tuple[str, ...], Vocabulary | ClosedList]
    captions: Callable[[Uniforms, int], list[str]] | None = None

    empty_images: ClassVar[bool] = True

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used, or nothing can be learned from it."""
        found = [r for r in regions(example) if r.box[0] < r.box[2] and r.box[1] < r.box[3]]
        vocabulary = self.vocabularies.get(tuple(example.get("classes", ())))
        makers = {"captions": _named_in_captions, "classes": _of_classes, "phrases": _of_phrases}
        asked = {kind: makers[kind](example, found, vocabulary) for kind in self.texts.kinds}
        asked = [(kind, rows) for kind, rows in asked.items() if rows is not None]
        if not asked:
            raise BadImageError(f"it has no boxes by which {' or '.join(self.texts.kinds)} could be learned")
        kind, rows = asked[uniforms.below(len(asked)) if self.train else 0]
        flip = self.train and self.flip and uniforms() < 0.5
        text, tokens, positive, flip = getattr(self, f"_{kind}")(example, rows, vocabulary, uniforms, flip)
        geometry = self.crop.draw(example, uniforms, flip=flip)
        image = self.crop.pixels(example, uniforms, geometry)
        row = {"image": image, "text": tokens, "counted": self._counted(text, tokens)}
        return row | self._boxes(rows, positive, geometry, uniforms)

    def _counted(self, text: str, tokens: np.ndarray) -> np.ndarray:
        if self.texts.signs or self.tokenizer is None:
            return np.arange(self.length) < int(lengths(tokens))
        covered = self.tokenizer.spans(text, self.length)
        spans = zip(covered.start.tolist(), covered.end.tolist(), strict=True)
        return np.array([first >= 0 and any(map(str.isalnum, text[first:end])) for first, end in spans])

    def _boxes(self, rows, positive, geometry: Geometry, uniforms: Uniforms) -> dict[str, np.ndarray]:
        boxes, there = geometry.boxes([region.box for region, _ in rows])
        said = zip(boxes, positive, there, strict=True)
        kept = [{"box": box, "positive": tokens} for box, tokens, inside in said if inside and tokens.any()]
        chosen = choose(kept, self.slots, uniforms if self.train else None)
        blank = {"box": np.zeros(4, np.float32), "positive": np.zeros(self.length, bool)}
        return fill(chosen, self.slots, blank) | {"left": np.int32(len(rows) - len(chosen))}

    def _captions(self, example, rows, vocabulary, uniforms, flip):
        """A caption that names boxes, perhaps among others; rows that another caption names have no tokens."""
        named = sorted({span[0] for region, _ in rows for span in region.spans})
        number = named[uniforms.below(len(named)) if self.train else 0]
        caption = as_text(example["text"][number])
        spans = [[(first, end) for n, first, end in region.spans if n == number] for region, _ in rows]
        caption, spans, flip = self._turned(caption, spans, flip)
        count = packing.draw_others(uniforms, self.texts.packed) if self.train and self.captions else 0
        if count:
            others = self.captions(uniforms, count)
            packed = packing.pack(caption, spans, others, self.tokenizer, self.length, uniforms)
            caption, spans = packed.text, packed.spans
        covered = self.tokenizer.spans(caption, self.length)
        return caption, covered.tokens, positive_map(spans, covered), flip

    def _classes(self, example, rows, vocabulary, uniforms, flip):
        """A prompt of classes."""
        if vocabulary is None:
            return self._listed([region.category for region, _ in rows], uniforms, flip)
        labels = [label for _, label in rows]
        prompt = self._prompt(example, labels, vocabulary, uniforms)
        sided = any(names_sides(clean_name(vocabulary.categories[label].name)) for label in set(labels))
        return prompt.text, prompt.tokens, prompt.rows(labels), flip and not sided

    def _prompt(self, example, labels: Sequence[int], vocabulary: Vocabulary, uniforms: Uniforms) -> Prompt:
        if self.texts.order == "fixed" or not self.train:
            prompts = vocabulary.prompts()
            return prompts[uniforms.below(len(prompts)) if self.train else 0]
        lists, numbers = looked_for(example), vocabulary.numbers
        absent = None if lists is None else [numbers[name] for name in lists[0] if name in numbers]
        # Crowds are no boxes, but what they are of is there.
        crowded = {_number(region, numbers) for region in crowds(example)} - {-1}
        how = dict(negatives=self.texts.negatives, full=self.texts.full, among=absent, without=crowded)
        return sampled_prompt(labels, vocabulary, uniforms, **how)[0]

    def _phrases(self, example, rows, vocabulary, uniforms, flip):
        """A prompt of what is said of boxes, one phrase of each."""
        said = [region.phrases[uniforms.below(len(region.phrases)) if self.train else 0] for region, _ in rows]
        return self._listed(said, uniforms, flip)

    def _listed(self, names: Sequence[str], uniforms: Uniforms, flip: bool):
        """Texts of boxes, one after another in random order, as many as there is room for."""
        names = [" ".join(name.split()) for name in names]
        distinct = choose(list(dict.fromkeys(names)), len(names), uniforms if self.train else None)
        text, places = "", {}
        for name in distinct:
            begin = len(text) + len(SEPARATOR) * bool(text)
            text = f"{text}{SEPARATOR if text else ''}{name}"
            places[name] = (begin, begin + len(name))
        text, spans, flip = self._turned(text, [[places[name]] for name in names], flip)
        covered = self.tokenizer.spans(text, self.length)
        return text, covered.tokens, positive_map(spans, covered), flip

    def _turned(self, text: str, spans, flip: bool):
        """A text of the image as it will be: with sides swapped, or an image that stays."""
        if not flip or not names_sides(text):
            return text, spans, flip
        if self.texts.sides == "skip":
            return text, spans, False
        text, moved = swap_sides_with_spans(text, [span for own in spans for span in own])
        moved = iter(moved)
        return text, [[next(moved) for _ in own] for own in spans], True


def _named_in_captions(example, found: Sequence[Region], vocabulary) -> list[tuple[Region, int]] | None:
    captions = example.get("text", ())
    rows = [(region, -1) for region in found if any(n < len(captions) for n, _, _ in region.spans)]
    return rows or None


def _of_classes(example, found: Sequence[Region], vocabulary: Vocabulary | None) -> list[tuple[Region, int]] | None:
    """Boxes with their classes' numbers in the vocabulary. An image without boxes is one of its data set's classes, of
    which it has none; where there is no closed list, or where boxes have phrases alone, nothing is known of it."""
    if vocabulary is None:
        return [(region, -1) for region in found if region.category] or None
    numbers = vocabulary.numbers
    named = ((region, _number(region, numbers)) for region in found)
    rows = [(region, number) for region, number in named if number >= 0]
    return rows if rows or not found else None


def _number(region: Region, numbers: Mapping[str, int]) -> int:
    return region.label if region.label >= 0 else numbers.get(region.category, -1)


def _of_phrases(example, found: Sequence[Region], vocabulary) -> list[tuple[Region, int]] | None:
    return [(region, -1) for region in found if region.phrases] or None


def check_texts(texts: Texts) -> None:
    """Raises UserError where options of texts are unknown or contradict each other."""
    asked = [("texts", kind, TEXTS) for kind in texts.kinds]
    for name, value, known in (*asked, ("order", texts.order, ORDERS), ("sides", texts.sides, SIDES)):
        if value not in known:
            raise UserError(f"objective.{name}: {value!r} is unknown." + nearest(value, known))
    if not texts.kinds or len(set(texts.kinds)) < len(texts.kinds):
        raise UserError(f"objective.texts should name some of {', '.join(TEXTS)}, each once, not {texts.kinds}.")
    if texts.negatives < 0 or texts.packed < 0 or not 0 <= texts.full <= 1:
        raise UserError("objective: negatives and packed must not be negative, and full must be between 0 and 1.")
    if texts.packed and "captions" not in texts.kinds:
        raise UserError("objective.packed puts captions around captions: objective.texts should name 'captions'.")


def vocabulary(model_options: Any, tokenizer: Any, names, *, prefix: str = "") -> Vocabulary | ClosedList:
    """Classes in the form that a model reads.

    Args:
      model_options: of the model (`capvl.models.glip.GlipOptions`).
      tokenizer: its own; None where it reads no texts.
      names: see `capvl.data.text.category_prompts.categories`.
      prefix: what stands before the classes.

    Raises:
      UserError: see `Vocabulary` and `ClosedList`.
    """
    if model_options.classes:
        return ClosedList(names, model_options.classes)
    return Vocabulary(names, tokenizer, model_options.length, prefix=prefix)
