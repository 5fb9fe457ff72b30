"""Captions that the model writes for held-out images: for the report, and measured against people's."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from capvl.data.reading import sources
from capvl.decoding.generate import GREEDY, Decoding, planned_length
from capvl.decoding.names import Names
from capvl.errors import UserError
from capvl.evals import Context, Samples, caption_metrics, submissions
from capvl.evals.encode import image_transform, over_batches
from capvl.evals.perplexity import opened_pairs
from capvl.inference.compiled import compiled
from capvl.inference.writing import prompt, write
from capvl.models.abilities import Ability


@dataclasses.dataclass(frozen=True)
class Captions(Decoding):
    """Yields `samples`, `distinct`: the share of different captions, and each of `metrics` by COCO's names.
    How captions are written is said by the options of `Decoding`.

    Attributes:
      name, split: data set; "" for the training set's.
      count: images; 0 for all.
      shown: how many of them are in the report.
      submission: format of a file of results (`capvl.evals.submissions.FORMATS`); "" for none.
      metrics: of "bleu", "meteor", "rouge", "cider" and "spice".
    """

    name: str = ""
    split: str = "val"
    count: int = 24
    shown: int = 24
    submission: str = ""
    metrics: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if min(self.count, self.shown) < 0:
            raise UserError("captions: count and shown must not be negative.")
        if self.submission:
            submissions.check(self.submission)

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.DECODER, "captions")
        caption_metrics.check(self.metrics)
        self.check(context.model.vocab)
        source = opened_pairs(context, self.name, self.split)
        if self.count:
            source = sources.Subset(source, np.arange(min(self.count, len(source))))
        writer, decode = compile_writer(context, self, "caption")
        names = sources.names(source) if self.submission else []
        if names:
            submissions.check_unique(self.submission, [submissions.Written(n, "", "") for n in names])

        def evaluate(params):
            images, written, kept = [], [], []

            def write_some(batch):
                tokens = writer(params, batch["image"])
                some = {"image": batch["image"]} if len(images) < self.shown else {}
                return {"tokens": tokens, "mask": batch["mask"], "index": batch["index"]} | some

            def read_some(found) -> None:
                mask = found["mask"]
                images.extend(found["image"][mask] if "image" in found else [])
                written.extend(decode(t) for t in found["tokens"][mask])
                kept.extend(found["index"][mask])

            transform, what = image_transform(context), f"captions of {source.name}"
            over_batches(context, source, transform, write_some, what, after=read_some)
            if self.submission:
                rows = [submissions.Written(names[i], "", text) for i, text in zip(kept, written, strict=True)]
                submissions.write(context.folder, f"{source.name}_{self.split}", self.submission, rows)
            yield "distinct", len(set(written)) / max(len(written), 1)
            if self.metrics or self.shown:
                every = list(captions_of_all(source))
                references = [every[i] for i in kept]
            if self.metrics:
                keys = [str(i) for i in range(len(written)) if references[i]]
                corpus, _ = caption_metrics.scores(
                    {k: references[int(k)] for k in keys}, {k: written[int(k)] for k in keys}, self.metrics
                )
                yield from corpus.items()
            n = self.shown
            if n:
                first = [r[0] if r else "" for r in references[:n]]
                yield "samples", Samples(images[:n], written[:n], first)

        return evaluate


def captions_of(source, index: int) -> list[str]:
    """What people wrote for an image."""
    return [sources.as_text(t) for t in source.read(int(index), ("text",))["text"]]


def captions_of_all(source) -> Iterator[list[str]]:
    """The same of all images, in order."""
    return ([sources.as_text(t) for t in record["text"]] for record in source.annotations(("text",)))


def compile_writer(
    context: Context, decoding: Decoding = GREEDY, task: str = "", names: Names | None = None, widest: int = 0
):
    """(jitted (params, uint8 images, or these and prompts (B, P)) -> tokens (B, L), a function from tokens to text).

    Args:
      context: of the run.
      decoding: how.
      task: that the objective's `prompt` knows; "" where prompts are given with the images.
      names: what is written is one of these.
      widest: tokens of the longest of the prompts that are given.

    Raises:
      UserError: the model can't write so (`capvl.decoding.generate.planned_length`).
    """
    options, tokenizer = context.model, context.tokenizer()
    own = prompt(options, context.objective, tokenizer, task) if task else None
    length = planned_length(options, decoding, len(own) if task else widest, names)

    def function(model, rows):
        image, prompt_BP = rows if isinstance(rows, tuple) else (rows, None)
        if prompt_BP is None:
            prompt_BP = jnp.broadcast_to(jnp.asarray(own)[None], (len(image), len(own)))
        key = jax.random.key(context.seed)
        return write(model, image, prompt_BP, length, tokenizer.eos, decoding, key=key, names=names)

    return compiled(context.blueprint, function), tokenizer.decode
