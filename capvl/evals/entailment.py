"""Visual entailment: does an image entail a sentence, contradict it, or neither (SNLI-VE, arXiv 1901.06706)?"""

import dataclasses
import pathlib
from collections import defaultdict

import numpy as np
import pydantic

from capvl.data.examples.statements import class_of
from capvl.data.preparing.stated import ENTAILMENT, UNDECIDED, Pair
from capvl.data.reading import lookup
from capvl.errors import UserError
from capvl.evals import Context, check_limits, judge
from capvl.evals.compositionality import GREY, PairScorer, check_by, needed
from capvl.lines import parse_json, read_text, split
from capvl.models.abilities import Ability, abilities


@dataclasses.dataclass(frozen=True)
class Entailment:
    """Yields `auc`: how often an entailed sentence scores above a contradicted one of any image (ties half),
    `auc_neutral` for entailed against neutral ones, `blind` and `blind_neutral` for the same with a grey image,
    and `count`.

    A captioner's score is log p(sentence | image) - log p(sentence | grey image), per token: sentences differ in
    length and in how likely they are by themselves. A matching head's is its own, a two-tower model's the cosine. That
    of a class head is the log-probability of entailment, and there is also what `capvl.evals.judge.Judged` yields but
    `blind`, which is `accuracy_blind` here.

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
        by_class = not self.by and Ability.JUDGES in abilities(context.model)
        if not by_class:
            context.require(needed(self.by), "entailment")
        rows = read_pairs(context.path(self.file))[: self.limit or None]
        images = lookup.open_images(context.path(self.images), context.data.directory())
        found, _ = images.find(image for image, _, _ in rows)
        rows = [r for r in rows if r[0] in found]
        if not rows:
            raise UserError(f"None of the images of {self.file!r} is in {self.images!r}.")
        if by_class:
            return _by_class(context, rows, found)
        scorer = PairScorer(context, by=self.by, mean=True)
        likelihood = scorer.by == "likelihood"

        def evaluate(params):
            pairs = [(name, text) for image, text, _ in rows for name in (image, GREY)]
            scores = scorer(params, list(dict.fromkeys(pairs)), found)
            kept = [row for row in rows if row[:2] in scores]
            blind = np.array([scores[GREY, text] for _, text, _ in kept])
            sighted = np.array([scores[image, text] for image, text, _ in kept])
            labels = np.array([label for _, _, label in kept])
            yield from areas(labels, sighted - blind if likelihood else sighted, blind)
            yield "count", float(len(kept))

        return evaluate


def _by_class(context: Context, rows: list[tuple[str, str, str]], found):
    """The evaluation of a class head: see `Entailment`."""
    classes, grouped = context.model.classes, defaultdict(list)
    for image, text, label in rows:
        grouped[image].append(judge.Statement(text, class_of(label, classes)))
    examples = [judge.Stated(lambda read=found[image]: [read()], stated) for image, stated in grouped.items()]
    scorer, entailed = judge.Scorer(context), class_of("entailment", classes)

    def evaluate(params):
        statements, scores = scorer(params, examples)
        _, blind = scorer(params, examples, blind=True)
        names = np.array([classes[s.label].casefold() for s in statements])
        yield from areas(names, scores[:, entailed], blind[:, entailed])
        for name, value in judge.results(statements, scores, blind, classes):
            yield ("accuracy_blind" if name == "blind" else name), value

    return evaluate


def areas(labels: np.ndarray, sighted: np.ndarray, blind: np.ndarray):
    """(name, value) of `auc` and `blind`, and of both with neutral sentences, from scores of being entailed."""
    for name, values in (("auc", sighted), ("blind", blind)):
        for suffix, other in (("", "contradiction"), ("_neutral", "neutral")):
            if (labels == other).any() and (labels == "entailment").any():
                yield f"{name}{suffix}", auc(values[labels == "entailment"], values[labels == other])


def read_pairs(path: str) -> list[tuple[str, str, str]]:
    """(image name, sentence, label) rows.

    Raises:
      UserError: missing, or a row that isn't of this format.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(
            f"The file {path!r} of entailment pairs is missing; it should hold JSON lines with hypothesis, label "
            f"({', '.join(ENTAILMENT)}) and image_id."
        )
    rows = []
    for number, line in enumerate(split(read_text(path, "The file of entailment pairs")), 1):
        if not line.strip():
            continue
        try:
            row = Pair.model_validate(parse_json(line))
        except ValueError as e:
            first = e.errors()[0]["msg"] if isinstance(e, pydantic.ValidationError) else e
            raise UserError(f"Line {number} of {path!r} is no entailment pair: {first}.") from e
        if row.label != UNDECIDED:
            rows.append((row.image, row.text, row.label))
    return rows


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """Share of the pairs (a, b) with a > b, ties half."""
    return float((above[:, None] > below[None]).mean() + 0.5 * (above[:, None] == below[None]).mean())
