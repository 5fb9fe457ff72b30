"""Object hallucination in captions of embedded scenes: every object that is named is looked up in the scene.

As CHAIR does with COCO's objects (arXiv 1809.02156, section 2.1): 1 - `right` is its share of hallucinated objects.
"""

import dataclasses
import re

import numpy as np

from capvl.data.reading import sources
from capvl.data.scenes.world import COLORS, SHAPES, WORDS
from capvl.decoding.generate import Decoding
from capvl.evals import Context, check_limits
from capvl.evals.captions import compile_writer
from capvl.evals.encode import over_images
from capvl.evals.vqa import confusion
from capvl.models.abilities import Ability

_NAMED = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b|\bword ({'|'.join(WORDS)})\b")


@dataclasses.dataclass(frozen=True)
class Hallucination(Decoding):
    """Yields, of captions of an embedded data set: `right`: the share of named objects (colour and shape, or the word)
    that are there; `found`: the share of objects that are named; `all_right`: the share of captions that name something
    and nothing wrong; `words`: `right` of words alone; and each as `blind/…` for grey images. The report shows which
    shape was named for the only object of a colour, and which word for the word. How captions are written is said by
    the options of `Decoding`.

    Attributes:
      name, split: an embedded data set; "" for the training set's.
      limit: images; 0 for all.
    """

    name: str = ""
    split: str = "val"
    limit: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_limits(self, "limit")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.DECODER, "hallucination")
        data = context.data
        name = self.name or data.parts()[0][0]
        source = sources.open_source(name, self.split, data.directory(), features=(context.visual,))
        if self.limit:
            source = sources.Subset(source, np.arange(min(self.limit, len(source))))
        scenes = [things(record["objects"]) for record in source.annotations(("objects",))]
        writer, decode = compile_writer(context, self, "caption")

        def written(params, blind: bool) -> list[str]:
            tokens, _ = over_images(context, source, writer, params, f"captions of {name}", blind=blind)
            return [decode(row) for row in tokens]

        def evaluate(params):
            texts = written(params, blind=False)
            yield from shares(texts, scenes)
            yield from ((f"blind/{key}", value) for key, value in shares(written(params, blind=True), scenes))
            for title, pairs in taken_for(texts, scenes).items():
                if pairs:
                    yield "confusion", confusion(title, pairs)

        return evaluate


def things(objects: dict) -> set[tuple[str, str]]:
    """(colour, shape) of every object of a record, ("word", text) of words."""
    columns = ([sources.as_text(v) for v in objects[key]] for key in ("color", "shape", "word"))
    return {("word", word) if word else (color, shape) for color, shape, word in zip(*columns, strict=True)}


def mentions(text: str) -> list[tuple[str, str]]:
    """What a caption names, as `things` has it."""
    return [("word", m[3]) if m[3] else (m[1], m[2]) for m in _NAMED.finditer(text.lower())]


def shares(texts: list[str], scenes: list[set[tuple[str, str]]]):
    """(name, value) of the shares that `Hallucination` yields."""
    named = [mentions(text) for text in texts]
    hits = [[m in scene for m in row] for row, scene in zip(named, scenes, strict=True)]
    both = [pair for row, own in zip(named, hits, strict=True) for pair in zip(row, own, strict=True)]
    total = sum(map(len, scenes))
    yield "right", _mean([hit for _, hit in both])
    yield "found", sum(len(set(row) & scene) for row, scene in zip(named, scenes, strict=True)) / max(total, 1)
    yield "all_right", _mean([bool(own) and all(own) for own in hits])
    yield "words", _mean([hit for (kind, _), hit in both if kind == "word"])


def _mean(values: list[bool]) -> float:
    return float(np.mean(values)) if values else 0.0


def taken_for(texts: list[str], scenes: list[set[tuple[str, str]]]) -> dict[str, list[tuple[str, str]]]:
    """(right, written) pairs: the shape of the only object of a named colour, and the only word."""
    pairs: dict[str, list[tuple[str, str]]] = {"shapes in captions": [], "words in captions": []}
    for text, scene in zip(texts, scenes, strict=True):
        for kind, named in mentions(text):
            own = [thing for thing in scene if thing[0] == kind]
            if len(own) == 1:
                pairs["words in captions" if kind == "word" else "shapes in captions"].append((own[0][1], named))
    return pairs
