"""Visual entailment: does an image entail a sentence, contradict it, or neither (SNLI-VE, arXiv 1901.06706)?"""

import dataclasses
import pathlib
from typing import Literal

import numpy as np
import pydantic

from capvl.data.reading import lookup
from capvl.data.reading.rows import Id, Row, Text
from capvl.errors import UserError
from capvl.evals import Context, check_limits
from capvl.evals.compositionality import GREY, PairScorer, check_by, needed
from capvl.lines import parse_json, read_text, split

UNDECIDED = "-"
LABELS = ("entailment", "neutral", "contradiction")


@dataclasses.dataclass(frozen=True)
class Entailment:
    """Yields `auc`: how often an entailed sentence scores above a contradicted one of any image (ties half),
    `auc_neutral` for entailed against neutral ones, `blind` and `blind_neutral` for the same with a grey image,
    and `count`.

    A captioner's score is log p(sentence | image) - log p(sentence | grey image), per token: sentences differ in
    length and in how likely they are by themselves. A matching head's is its own, a two-tower model's the cosine.

    Attributes:
      file: JSON lines with `hypothesis`, `label`, and the image as `image_id` or `key`, or SNLI-VE's own (`sentence2`,
        `gold_label`, `Flickr30K_ID` or `captionID`; those without a gold label, "-", are left out); {data_dir} is where
        prepared data sets are.
      images: a folder of image files, or a prepared data set.
      by: "likelihood", "match" or "similarity"; "" for the first of these that the model can do.
      limit: pairs; 0 for all.
    """

    file: str = ""
    images: str = ""
    by: str = ""
    limit: int = 0

    def __post_init__(self):
        check_limits(self, "limit")
        check_by("entailment", self.by)

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(needed(self.by), "entailment")
        rows = read_pairs(context.path(self.file))[: self.limit or None]
        images = lookup.open_images(context.path(self.images), context.data.directory())
        found, _ = images.find(image for image, _, _ in rows)
        rows = [r for r in rows if r[0] in found]
        if not rows:
            raise UserError(f"None of the images of {self.file!r} is in {self.images!r}.")
        scorer = PairScorer(context, by=self.by, mean=True)
        likelihood = scorer.by == "likelihood"

        def evaluate(params):
            pairs = [(name, text) for image, text, _ in rows for name in (image, GREY)]
            scores = scorer(params, list(dict.fromkeys(pairs)), found)
            kept = [row for row in rows if row[:2] in scores]
            blind = np.array([scores[GREY, text] for _, text, _ in kept])
            sighted = np.array([scores[image, text] for image, text, _ in kept])
            labels = np.array([label for _, _, label in kept])
            for name, values in (("auc", sighted - blind if likelihood else sighted), ("blind", blind)):
                for suffix, other in (("", "contradiction"), ("_neutral", "neutral")):
                    if (labels == other).any() and (labels == "entailment").any():
                        yield f"{name}{suffix}", auc(values[labels == "entailment"], values[labels == other])
            yield "count", float(len(kept))

        return evaluate


class _Pair(Row):
    """SNLI-VE names the image, and before "#" in the caption's id."""

    image: Id = pydantic.Field(
        validation_alias=pydantic.AliasChoices("image_id", "Flickr30K_ID", "image", "key", "captionID")
    )
    text: Text = pydantic.Field(validation_alias=pydantic.AliasChoices("hypothesis", "sentence2"))
    label: Literal[*LABELS, UNDECIDED] = pydantic.Field(validation_alias=pydantic.AliasChoices("label", "gold_label"))

    @pydantic.field_validator("image")
    @classmethod
    def _of_caption(cls, value: str) -> str:
        return value.partition("#")[0]


def read_pairs(path: str) -> list[tuple[str, str, str]]:
    """(image name, sentence, label) rows.

    Raises:
      UserError: missing, or a row that isn't of this format.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(
            f"The file {path!r} of entailment pairs is missing; it should hold JSON lines with hypothesis, label "
            f"({', '.join(LABELS)}) and image_id."
        )
    rows = []
    for number, line in enumerate(split(read_text(path, "The file of entailment pairs")), 1):
        if not line.strip():
            continue
        try:
            row = _Pair.model_validate(parse_json(line))
        except ValueError as e:
            first = e.errors()[0]["msg"] if isinstance(e, pydantic.ValidationError) else e
            raise UserError(f"Line {number} of {path!r} is no entailment pair: {first}.") from e
        if row.label != UNDECIDED:
            rows.append((row.image, row.text, row.label))
    return rows


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """Share of the pairs (a, b) with a > b, ties half."""
    return float((above[:, None] > below[None]).mean() + 0.5 * (above[:, None] == below[None]).mean())
