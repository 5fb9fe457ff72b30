"""How often a class head is right about statements: NLVR2, and visual entailment from a prepared data set.

Beside stand the majority's share and the blind control: the same model with grey images, which shows what the words
alone give away.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from capvl.data.examples.statements import FEATURES, class_of, images_of
from capvl.data.images.decode import BadImageError
from capvl.data.randomness import Uniforms
from capvl.data.reading import sources
from capvl.data.reading.texts import questions
from capvl.errors import UserError
from capvl.evals import Confusion, Context, check_limits
from capvl.evals.encode import image_transform, over_made, tokenize
from capvl.evals.labels import chance
from capvl.inference.compiled import compiled
from capvl.models.abilities import Ability
from capvl.terminal import say

_NLVR_ID = re.compile(r"(.+-\d+)-\d+-(\d+)", re.ASCII)
"""SPLIT-SET-PAIR-SENTENCE: a sentence's pairs differ in the third part."""


class Statement(NamedTuple):
    """What is said, the number of the class that holds, its kind, and the id by which pairs of a sentence are known."""

    text: str
    label: int
    kind: str = ""
    id: str = ""


class Stated(NamedTuple):
    """An example: a function that reads its encoded images, and statements about them."""

    read: Callable[[], list[bytes]]
    statements: list[Statement]


@dataclasses.dataclass(frozen=True)
class Judged:
    """Yields `accuracy`, `accuracy/CLASS` of those of a class, `kind/KIND` of those of a kind, `blind`: the accuracy
    with grey images, `majority`: the share of the commonest class, `count`, a `Confusion`, and where ids are NLVR2's
    `consistency`: the share of sentences that are judged rightly with each of their pairs.

    Attributes:
      name, split: data set with statements (`capvl.data.examples.statements`); "" for the training set's.
      limit: statements; 0 for all.
    """

    name: str = ""
    split: str = "val"
    limit: int = 0

    def __post_init__(self):
        check_limits(self, "limit")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.JUDGES, "judge")
        name = self.name or context.data.parts()[0][0]
        source = sources.open_source(name, self.split, context.data.directory(), features=FEATURES)
        found = list(read_statements(source, context.model, self.limit))
        if not found:
            raise UserError(f"Data set {name!r} has no statement with a label in its split {self.split!r}.")
        scorer = Scorer(context)

        def evaluate(params):
            statements, scores = scorer(params, found)
            _, blind = scorer(params, found, blind=True)
            yield from results(statements, scores, blind, context.model.classes)

        return evaluate


def read_statements(source, model_options, limit: int = 0) -> Iterator[Stated]:
    """The examples of a data set whose statements have labels, with at most so many of these (0: all).

    Raises:
      UserError: a label is no class of the model's, or an example has another number of images.
    """
    left = limit
    for i, record in enumerate(source.annotations(("questions",), likely=limit)):
        asked = [q for q in questions(record["questions"]) if q.answers]
        asked = asked[:left] if limit else asked
        statements = [Statement(q.question, class_of(q.answers[0], model_options.classes), q.kind, q.id) for q in asked]
        if statements:
            left -= len(statements)
            yield Stated(functools.partial(_images, source, i, model_options.images), statements)
        if limit and not left:
            return


def _images(source, index: int, count: int) -> list[bytes]:
    return images_of(source[index], count)


class Scorer:
    """Log-probabilities of the classes of statements, several about the same images at once."""

    TEXTS = 4

    def __init__(self, context: Context):
        """context: of the run."""
        self._context, self._crop = context, image_transform(context).crop
        self._judge = compiled(context.blueprint, lambda model, rows: jax.nn.log_softmax(model.judge(*rows)))

    def __call__(self, params, examples: Sequence[Stated], blind: bool = False) -> tuple[list[Statement], np.ndarray]:
        """The statements about images that can be used, and log-probabilities (N, c) of the classes of each; how many
        examples are left out is said.

        Args:
          params: of the model.
          examples: at least one.
          blind: the images are grey.
        """
        context = self._context
        texts = list(dict.fromkeys(s.text for e in examples for s in e.statements))
        tokens = dict(zip(texts, tokenize(context, texts), strict=True))
        rows = [
            (example.read, example.statements[i : i + self.TEXTS])
            for example in examples
            for i in range(0, len(example.statements), self.TEXTS)
        ]

        def make(n: int) -> dict[str, np.ndarray]:
            read, statements = rows[n]
            # What is left over repeats the first, so that no text is empty.
            texts = [*statements, *statements[:1] * (self.TEXTS - len(statements))]
            return {"image": self._pixels(read), "text": np.stack([tokens[s.text] for s in texts])}

        def scored(batch):
            return self._judge(params, (batch["image"], batch["text"]))

        out, bad = over_made(context, make, len(rows), scored, "statements", blind=blind)
        if bad:
            first = next(iter(bad.values()))
            say(f"{len(bad)} rows of statements have images that can't be used and are left out; the first: {first}.")
        if out is None:
            raise UserError("None of the images of the statements can be used.")
        kept = [statements for n, (_, statements) in enumerate(rows) if n not in bad]
        scores = [row[: len(statements)] for row, statements in zip(out, kept, strict=True)]
        return [s for statements in kept for s in statements], np.concatenate(scores)

    def _pixels(self, read: Callable[[], list[bytes]]) -> np.ndarray:
        try:
            encoded = read()
        except OSError as e:
            raise BadImageError(str(e)) from e
        return np.stack([self._crop({"image": data}, Uniforms(0, 0)) for data in encoded])


def results(statements: Sequence[Statement], scores: np.ndarray, blind: np.ndarray, classes: Sequence[str]):
    """(name, value) pairs of `Judged`.

    Args:
      statements: N.
      scores, blind: (N, c); the largest is the model's answer, and a tie with another class is wrong.
      classes: names of the c classes.
    """
    labels = np.array([s.label for s in statements])
    right = _right(scores, labels)
    yield "accuracy", float(right.mean())
    for number in sorted(set(labels.tolist())):
        yield f"accuracy/{classes[number]}", float(right[labels == number].mean())
    kinds = np.array([s.kind for s in statements])
    for kind in sorted(set(kinds.tolist()) - {""}):
        yield f"kind/{kind}", float(right[kinds == kind].mean())
    sentences = sentences_of([s.id for s in statements])
    if sentences:
        yield "consistency", float(np.mean([right[rows].all() for rows in sentences]))
    yield "blind", float(_right(blind, labels).mean())
    yield "majority", chance(labels)
    yield "count", float(len(labels))
    counts = np.zeros((len(classes) + 1, len(classes) + 1), np.int64)
    np.add.at(counts, (labels, scores.argmax(axis=1)), 1)
    yield "confusion", Confusion("statements", [*classes, "other"], counts)


def _right(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    own = scores[np.arange(len(labels)), labels]
    others = scores.copy()
    others[np.arange(len(labels)), labels] = -np.inf
    return own > others.max(axis=1)


def sentences_of(ids: Sequence[str]) -> list[list[int]]:
    """Numbers of the statements of each sentence, by ids of NLVR2's form; none where some are of another, or where no
    sentence comes with several pairs."""
    matches = [_NLVR_ID.fullmatch(id) for id in ids]
    if not all(matches):
        return []
    groups = defaultdict(list)
    for i, match in enumerate(matches):
        groups[match.groups()].append(i)
    return list(groups.values()) if max(map(len, groups.values()), default=0) > 1 else []
