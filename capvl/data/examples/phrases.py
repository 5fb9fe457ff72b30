"""Texts with what they are about: a whole image (pairs) or regions of one, as X-VLM is trained (arXiv 2111.08276)."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from capvl.data.examples.slots import choose, fill
from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError
from capvl.data.images.geometry import WHOLE, names_sides
from capvl.data.randomness import Uniforms
from capvl.data.reading.regions import Region, regions
from capvl.data.text.masking import Masking

SIDES = ("skip", "swap")
PAIR_TEXTS = ("captions", "regions")
REGION_TEXTS = ("phrases", "classes")


@dataclasses.dataclass(frozen=True)
class TextReader:
    """Tokens of texts, and the same texts with tokens masked.

    Attributes:
      tokenizer: the tokenizer.
      length: L.
      masking: of tokens; None for none.
    """

    tokenizer: Any
    length: int
    masking: Masking | None

    def __call__(self, text: str | bytes, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """text int32 (L,), and cut: whether it was too long; with masking also masked (L,), places and words (M,):
        where tokens are masked and what stood there, -1 for unused."""
        # One token more than there is room for tells whether the text was too long.
        tokens = self.tokenizer(text, self.length + 1)
        cut, tokens = tokens[-1] != 0, tokens[:-1]
        if cut:
            tokens[-1] = self.tokenizer.eos
        row = {"text": tokens, "cut": np.bool_(cut)}
        if self.masking is None:
            return row
        masked, places, words = self.masking(tokens, uniforms)
        return row | {"masked": masked, "places": places, "words": words}

    def says_something(self, row: dict[str, np.ndarray]) -> bool:
        """Whether a text that was read has any token of its own: cleaning may have left none."""
        return np.count_nonzero(row["text"]) > np.count_nonzero(self.tokenizer("", self.length))

    def blank(self) -> dict[str, np.ndarray]:
        """What stands in an empty slot."""
        row = {"text": np.zeros(self.length, np.int32), "cut": np.bool_(False)}
        if self.masking is None:
            return row
        most = self.masking.most
        unused = {"places": np.zeros(most, np.int32), "words": np.full(most, -1, np.int32)}
        return row | {"masked": np.zeros(self.length, np.int32)} | unused


def image_id(example: dict[str, Any]) -> np.int32:
    """A number of an Example's image, by its bytes: two Examples of one image have the same."""
    return np.int32(zlib.crc32(example["image"]) & 0x7FFFFFFF)


@dataclasses.dataclass(frozen=True)
class PairText:
    """image uint8 (R, R, 3), flip bool, id int32 of the image, and what `TextReader` gives of one of its texts.

    Attributes:
      crop: how images become pixels.
      read: reads texts.
      flip: whether half of the images are flipped (on the device).
      sides: what becomes of a flip where the caption names a side: "skip" (X-VLM) leaves it out, "swap" swaps words.
      train: random crop, flip and text; else the first text and no randomness.
      texts: "captions", or "regions" for what its regions are called.
      called: by which of REGION_TEXTS regions are called.
    """

    crop: Crop
    read: TextReader
    flip: bool
    sides: str
    train: bool
    texts: str = "captions"
    called: tuple[str, ...] = REGION_TEXTS

    @property
    def tokenizer(self) -> Any:
        """Of the texts."""
        return self.read.tokenizer

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used, or has no text, or one that says nothing."""
        if self.texts == "captions":
            texts = example["text"]
        else:
            texts = [text for region in regions(example) for text in texts_of(region, self.called)]
        if not texts:
            raise BadImageError("nothing is said of the image")
        text = texts[uniforms.below(len(texts)) if self.train else 0]
        flip = self.train and self.flip and uniforms() < 0.5
        flip = flip and not (self.sides == "skip" and names_sides(text))
        geometry = self.crop.draw(example, uniforms, flip=flip)
        image = self.crop.pixels(example, uniforms, geometry, flip_on_device=True)
        row = self.read(geometry.text(text), uniforms)
        if not self.read.says_something(row):
            raise BadImageError("its text says nothing")
        return {"image": image, "flip": np.bool_(geometry.flip), "id": image_id(example)} | row


@dataclasses.dataclass(frozen=True)
class RegionText:
    """image uint8 (R, R, 3), flip bool, id int32; and of S regions: box float32 (S, 4) in fractions of that image,
    whole bool (S,): it is all of the image, slots bool (S,), and what `TextReader` gives of a text of each.

    In training the crop keeps one region whole, drawn at random, which has a slot, and regions more than half of which
    lie in it; a caption is a region that is the whole image, and comes first (official code).

    Attributes:
      crop, read, flip, sides, train: as in `PairText`; whether a flip is left out goes by all texts of the image.
      slots: S.
      captions: whether captions are regions.
      called: by which of REGION_TEXTS regions are called; one that has no such name is left out.
    """

    crop: Crop
    read: TextReader
    flip: bool
    sides: str
    train: bool
    slots: int
    captions: bool = True
    called: tuple[str, ...] = REGION_TEXTS

    @property
    def tokenizer(self) -> Any:
        """Of the texts."""
        return self.read.tokenizer

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used."""
        named = ((region.box, texts_of(region, self.called)) for region in regions(example))
        found = [(box, texts) for box, texts in named if texts]
        captions = [t for t in example.get("text", ()) if t] if self.captions else []
        flip = self.train and self.flip and uniforms() < 0.5
        said = [*captions, *(text for _, texts in found for text in texts)]
        flip = flip and not (self.sides == "skip" and any(map(names_sides, said)))
        first = uniforms.below(len(found)) if self.train and found else 0
        found = found[first : first + 1] + found[:first] + found[first + 1 :]
        around = found[0][0] if self.train and found else None
        geometry = self.crop.draw(example, uniforms, flip=flip, around=around)
        boxes, there = geometry.boxes([box for box, _ in found])
        kept = [(box, texts, False) for (_, texts), box, inside in zip(found, boxes, there, strict=True) if inside]
        rows = [(np.array(WHOLE, np.float32), captions, True)] if captions else []
        rows += kept[: self.slots - len(rows)][:1]
        rows += choose(kept[1:], self.slots - len(rows), uniforms if self.train else None)
        filled = [self._row(*row, geometry, uniforms) for row in rows]
        filled = [row for row in filled if self.read.says_something(row)]
        blank = {"box": np.zeros(4, np.float32), "whole": np.bool_(False)} | self.read.blank()
        image = self.crop.pixels(example, uniforms, geometry, flip_on_device=True)
        of_image = {"image": image, "flip": np.bool_(geometry.flip), "id": image_id(example)}
        return of_image | fill(filled, self.slots, blank)

    def _row(self, box, texts: Sequence[str | bytes], whole: bool, geometry, uniforms: Uniforms) -> dict:
        text = texts[uniforms.below(len(texts)) if self.train else 0]
        return {"box": box, "whole": np.bool_(whole)} | self.read(geometry.text(text), uniforms)


def texts_of(region: Region, kinds: Sequence[str] = REGION_TEXTS) -> tuple[str, ...]:
    """What a region may be called, each text once.

    Args:
      region: the region.
      kinds: of REGION_TEXTS. "phrases" is what is said of it, "classes" the name of its class. One of its attributes
        stands before the class, as before a phrase where it has no class: "black cat" (official code).
    """
    nouns = (region.category,) if region.category else region.phrases
    described = [phrase for phrase in region.phrases if phrase not in nouns] if "phrases" in kinds else []
    named = nouns if ("classes" if region.category else "phrases") in kinds else ()
    # A noun may have the attribute among its words already.
    pairs = [(a, noun) for a in region.attributes for noun in named]
    named = [noun if f" {a} " in f" {noun} " else f"{a} {noun}" for a, noun in pairs] or list(named)
    return tuple(dict.fromkeys(described + named))
