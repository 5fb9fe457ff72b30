"""Answers that the model writes to questions about images, and class names that it writes."""

import dataclasses
import string

import numpy as np

from capvl.data import sources
from capvl.data.randomness import Uniforms
from capvl.errors import UserError, nearest
from capvl.evals import Context
from capvl.evals.captions import compile_writer
from capvl.evals.encode import image_transform, over_rows


@dataclasses.dataclass(frozen=True)
class Answers:
    """Yields `exact`: the share of answers equal to one of the given ones; `soft`: min(matches / 3, 1), VQA's
    accuracy where ten people answered (arXiv 1505.00468, section 4), where there are several; `blind`: `exact` with
    a grey image; and `exact/KIND` for questions with a kind. Case and punctuation don't count.

    Attributes:
      name, split: data set with `questions`; for task "classify", with labels that have names.
      task: "answer" or "classify".
      limit: questions or images; 0 for all.
      beams, length_penalty: as in `capvl.evals.captions.Captions`.
    """

    name: str = ""
    split: str = "val"
    task: str = "answer"
    limit: int = 0
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self):
        known = ("answer", "classify")
        if self.task not in known:
            raise UserError(f"answers: the task {self.task!r} is unknown." + nearest(self.task, known))

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require("a decoder", "answers")
        recipe = context.recipe
        feature = "questions" if self.task == "answer" else "class_name"
        name = self.name or recipe.data.parts()[0][0]
        source = sources.open_source(name, self.split, recipe.data.directory(), features=("image", feature))
        tokenizer = recipe.tokenizer()
        rows = [row for i in range(len(source)) for row in _asked(source.read(i, (feature,))[feature], i)]
        rows = rows[: self.limit or None]
        if not rows:
            raise UserError(f"Data set {name!r} has no {feature} in its split {self.split!r}.")
        prompts = [recipe.objective.prompt(recipe.model, tokenizer, self.task, row.question) for row in rows]
        width = max(map(len, prompts))
        prompts = np.stack([np.pad(p, (0, width - len(p))) for p in prompts]).astype(np.int32)
        write, decode = compile_writer(context, beams=self.beams, length_penalty=self.length_penalty)
        transform = image_transform(context)

        def written(params, blind: bool) -> list[str]:
            texts, size = [], context.batch
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                images = [transform(source[r.index], Uniforms(0, 0))["image"] for r in part]
                image = np.full_like(np.stack(images), 127) if blind else np.stack(images)
                batch = {"image": image, "prompt": prompts[first : first + size]}
                out = over_rows(
                    context, batch, lambda p, b: write(p, b["image"], b["prompt"]), params, f"questions of {name}"
                )
                texts += [decode(t) for t in out]
            return texts

        def evaluate(params):
            texts = written(params, blind=False)
            matches = np.array([_matches(t, r.answers) for t, r in zip(texts, rows, strict=True)])
            yield "exact", float((matches > 0).mean())
            if max(len(r.answers) for r in rows) > 1:
                yield "soft", float(np.minimum(matches / 3, 1).mean())
            kinds = np.array([r.kind for r in rows])
            for kind in sorted(set(kinds) - {""}):
                yield f"exact/{kind}", float((matches[kinds == kind] > 0).mean())
            blind = [_matches(t, r.answers) > 0 for t, r in zip(written(params, blind=True), rows, strict=True)]
            yield "blind", float(np.mean(blind))

        return evaluate


@dataclasses.dataclass(frozen=True)
class _Row:
    index: int
    question: str
    answers: tuple[str, ...]
    kind: str


def _asked(value, index: int) -> list[_Row]:
    """Questions of one record: a dict of lists (tfds' sequences), or a class name."""
    if not isinstance(value, dict):
        return [_Row(index, "", (sources.as_text(value),), "")] if len(value) else []
    answers = value.get("answers", value.get("answer"))
    kinds = value.get("kind", [""] * len(value["question"]))
    rows = []
    for question, answer, kind in zip(value["question"], answers, kinds, strict=True):
        many = (
            tuple(map(sources.as_text, answer))
            if isinstance(answer, list | tuple | np.ndarray)
            else (sources.as_text(answer),)
        )
        rows.append(_Row(index, sources.as_text(question), many, sources.as_text(kind)))
    return rows


_DROPPED = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation, single spaces."""
    return " ".join(text.lower().translate(_DROPPED).split())


def _matches(text: str, answers: tuple[str, ...]) -> int:
    return sum(normalize(text) == normalize(answer) for answer in answers)
