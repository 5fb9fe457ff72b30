"""Visual question answering by writing: answers to questions about images or clips, class names, words in images."""

import collections
import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from capvl.data.randomness import Uniforms
from capvl.data.reading import sources
from capvl.data.reading.texts import FEATURES, questions
from capvl.decoding.generate import Decoding, planned_length
from capvl.decoding.names import Names
from capvl.decoding.ranking import rank
from capvl.errors import UserError, nearest
from capvl.evals import Confusion, Context, answer_metrics, check_limits, submissions
from capvl.evals.captions import compile_writer
from capvl.evals.encode import check_decoded, image_transform, over_made
from capvl.evals.labels import class_names
from capvl.inference.compiled import compiled
from capvl.inference.writing import begin, prompts
from capvl.lines import read_lines
from capvl.models.abilities import Ability
from capvl.terminal import say

SHOWN = 16
_USUAL = {field.name: field.default for field in dataclasses.fields(Decoding)}
FEATURE_OF = FEATURES | {"read": "text"}


@dataclasses.dataclass(frozen=True)
class Vqa(Decoding):
    """Yields each of `metrics`: the mean over questions with answers; METRIC/KIND for questions with a kind, beside
    METRIC/blind and METRIC/blind/KIND: the same with grey images; METRIC/prior and METRIC/prior/KIND: the same for the
    answer that is commonest in training for these words of a question; and a `Confusion` of every kind. How answers
    are written is said by the options of `Decoding`.

    Attributes:
      name, split: data set with `questions`; for task "classify", with class names.
      task: "answer", "classify", "caption" or "read"; for the last two what is right is any of the captions.
      limit: questions or images; 0 for all.
      metrics: of `capvl.evals.answer_metrics.METRICS`; the first one is that of `blind` and `prior`.
      prior: split of the same data set that the commonest answers are counted on; "" for none.
      vocabulary: what may be written: "" for anything, "classes" for the data set's class names, or a file of texts.
      rank: 0: answers are written; k: they are the likeliest texts of the vocabulary, whole, of the k whose first
        tokens are likeliest (`capvl.decoding.ranking`).
      first_twice: ranked by log p(first token) + log p(answer), as the code of ALBEF and X-VLM does.
      submission: format of a file of results (`capvl.evals.submissions.FORMATS`); "" for none.
    """

    name: str = ""
    split: str = "val"
    task: str = "answer"
    limit: int = 0
    metrics: tuple[str, ...] = ("exact",)
    prior: str = ""
    vocabulary: str = ""
    rank: int = 0
    first_twice: bool = False
    submission: str = ""

    def __post_init__(self):
        super().__post_init__()
        check_limits(self, "limit", "rank")
        if self.rank and not self.vocabulary or self.first_twice and not self.rank:
            raise UserError("vqa: rank needs a vocabulary, and first_twice a rank.")
        if self.rank and any(getattr(self, name) != value for name, value in _USUAL.items()):
            raise UserError("vqa: what is ranked is not written: leave the options of writing (beams …) as they are.")
        for what, known in ((self.task, FEATURE_OF), *((m, answer_metrics.METRICS) for m in self.metrics)):
            if what not in known:
                raise UserError(f"vqa: {what!r} is unknown." + nearest(what, known))
        if not self.metrics:
            raise UserError("vqa.metrics should name one metric or more.")
        if self.submission:
            submissions.check(self.submission)

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require((Ability.DECODER, Ability.ANSWERS), "vqa")
        data, transform = context.data, image_transform(context)
        feature = FEATURE_OF[self.task]
        name = self.name or data.parts()[0][0]

        def opened(split: str, *keys: str):
            fields = None if self.name else data.fields()
            return sources.open_source(name, split, data.directory(), features=keys, fields=fields)

        source = opened(self.split, transform.crop.feature, feature)
        rows = read_rows(source, feature, self.limit)
        if not rows:
            raise UserError(f"Data set {name!r} has no {feature} in its split {self.split!r}.")
        if self.submission:
            submissions.check_unique(self.submission, [submissions.Written(r.image, r.id, "") for r in rows])
        prior = commonest(opened(self.prior, feature), feature) if self.prior else None
        tokenizer, asked = context.tokenizer(), [row.question for row in rows]
        prompt_NP, cut = prompts(context.model, context.objective, tokenizer, self.task, asked)
        if cut:
            say(f"{len(cut)} of {len(rows)} questions are longer than the model's prompts and were cut at their end.")
        writer, decode = self._writer(context, self._names(context, source, tokenizer), prompt_NP.shape[1])

        def written(params, blind: bool) -> list[str]:
            def make(n: int) -> dict[str, np.ndarray]:
                image = transform(source[rows[n].index], Uniforms(0, 0))["image"]
                return {"image": image, "prompt": prompt_NP[n]}

            def answer(batch):
                return writer(params, (batch["image"], batch["prompt"]))

            tokens, bad = over_made(context, make, len(rows), answer, f"questions of {name}", blind=blind)
            check_decoded(source, len(source) - len(bad))
            return [decode(t) for t in tokens]

        def evaluate(params):
            texts = written(params, blind=False)
            if self.submission:
                results = [submissions.Written(r.image, r.id, t) for r, t in zip(rows, texts, strict=True)]
                submissions.write(context.folder, f"{name}_{self.split}", self.submission, results)
            known = [i for i, row in enumerate(rows) if row.answers]
            if not known:
                return
            for metric in self.metrics:
                yield from means(metric, metric, rows, texts, known)
            first = self.metrics[0]
            yield from means(first, f"{first}/blind", rows, written(params, blind=True), known)
            if prior is not None:
                yield from means(first, f"{first}/prior", rows, [prior(row) for row in rows], known)
            for kind in sorted({rows[i].kind for i in known}):
                own = [i for i in known if rows[i].kind == kind]
                pairs = [(rows[i].answers[0], texts[i]) for i in own]
                yield "confusion", confusion(kind or self.task, pairs)

        return evaluate

    def _writer(self, context: Context, names: Names | None, widest: int):
        """What answers: writes, or ranks."""
        if self.rank:
            return compile_ranker(context, self, names, widest)
        return compile_writer(context, self, names=names, widest=widest)

    def _names(self, context: Context, source, tokenizer) -> Names | None:
        if not self.vocabulary:
            return None
        if self.vocabulary != "classes":
            return Names.of(read_lines(context.path(self.vocabulary), "answers"), tokenizer)
        name = self.name or context.data.parts()[0][0]
        labels = sources.labels(name, self.split, context.data.directory())
        names = source.label_names() or class_names("", source, labels)
        return Names.of(names, tokenizer)


def compile_ranker(context: Context, options: Vqa, names: Names, widest: int):
    """As `compile_writer`, for answers that are ranked: a jitted function that gives the likeliest text (B, W)."""
    planned_length(context.model, Decoding(max_tokens=names.longest), widest)

    def function(model, rows):
        image_kv, prompt_BP = begin(model, *rows)
        ranked = rank(model, image_kv, prompt_BP, names.sequences, options.rank, first_twice=options.first_twice)
        return jnp.asarray(names.sequences)[ranked.index_Bk[:, 0]]

    return compiled(context.blueprint, function), context.tokenizer().decode


class Row(NamedTuple):
    """One question: the record's number, the image's name, the question's id, words and kind, and what people said."""

    index: int
    image: str
    id: str
    question: str
    kind: str
    answers: tuple[str, ...]


def read_rows(source, feature: str, limit: int = 0) -> list[Row]:
    """All questions (or class names) of a source, at most `limit` where it isn't 0."""
    rows: list[Row] = []
    for i, record in enumerate(source.annotations((feature, *sources.NAMED_BY), likely=limit)):
        image = sources.name_in(record, i)
        if feature == "questions":
            rows += [Row(i, image, q.id, q.question, q.kind, q.answers) for q in questions(record[feature])]
        elif len(record[feature]):
            texts = record[feature] if isinstance(record[feature], list) else [record[feature]]
            rows.append(Row(i, image, "", "", "", tuple(map(sources.as_text, texts))))
        if limit and len(rows) >= limit:
            return rows[:limit]
    return rows


def means(metric: str, name: str, rows: list[Row], texts: list[str], known: list[int]):
    """(name, mean) of a metric over the questions whose answers are known, and (name/KIND, mean)."""
    score = answer_metrics.METRICS[metric]
    values = {i: score(texts[i], rows[i].answers) for i in known}
    yield name, float(np.mean(list(values.values())))
    for kind in sorted({rows[i].kind for i in known} - {""}):
        yield f"{name}/{kind}", float(np.mean([v for i, v in values.items() if rows[i].kind == kind]))


def commonest(source, feature: str):
    """A function from a `Row` to the commonest answer to its words, else to its kind, else of all: what can be known
    without looking. "" where nobody answered anything."""
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    for row in read_rows(source, feature):
        for key in (("question", row.question), ("kind", row.kind), ("", "")):
            counts[key].update(row.answers)

    def answer(row: Row) -> str:
        keys = (("question", row.question), ("kind", row.kind), ("", ""))
        return next((counts[key].most_common(1)[0][0] for key in keys if counts.get(key)), "")

    return answer


def confusion(title: str, pairs: list[tuple[str, str]]) -> Confusion:
    """Counts of (right, written) texts; rarer ones than the SHOWN commonest right ones are "other"."""
    pairs = [(answer_metrics.normalize(a), answer_metrics.normalize(b)) for a, b in pairs]
    common = collections.Counter(right for right, _ in pairs).most_common(SHOWN)
    names = [*sorted(name for name, _ in common), "other"]
    place = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), np.int64)
    for right, text in pairs:
        counts[place.get(right, -1), place.get(text, -1)] += 1
    return Confusion(title, names, counts)
