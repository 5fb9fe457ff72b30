"""Negative log-likelihood of held-out captions, autoregressive (Cap) and in parallel (Pa)."""

import dataclasses
import functools

import numpy as np

from capvl.data.examples.image_text import ImageText
from capvl.data.images.crops import Crop
from capvl.data.reading import sources
from capvl.errors import UserError, nearest
from capvl.evals import Context, check_limits, finite
from capvl.evals.encode import over_batches
from capvl.inference.compiled import compiled
from capvl.inference.scoring import pair_likelihoods, parallel_likelihoods
from capvl.models.abilities import Ability
from capvl.nn.padding import real


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Yields, for modes cap and pa: `nll` (nats per caption), `nll_per_token`, `perplexity` (its exp).

    Beside them stands `unigram/perplexity`: that of token frequencies, counted with one added to
    each on the first UNIGRAM_EXAMPLES training captions, on the same held-out captions.

    Attributes:
      name, split: data set; "" for the training set's.
      limit: examples; 0 for all.
      modes: of "cap" and "pa".
    """

    name: str = ""
    split: str = "val"
    limit: int = 0
    modes: tuple[str, ...] = ("cap", "pa")

    def __post_init__(self):
        check_limits(self, "limit")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        require_modes(context, "perplexity", self.modes)
        source, over_pairs = open_pairs(context, self.name, self.split, self.limit)
        score = {mode: compile_scores(context, parallel=mode == "pa") for mode in self.modes}
        log_frequency = unigram(context)

        def evaluate(params):
            unigram_total = 0.0
            totals = dict.fromkeys(self.modes, 0.0)
            examples = tokens = 0

            def scored(batch):
                scores = {mode: score[mode](params, (batch["image"], batch["text"])) for mode in self.modes}
                return batch["mask"], batch["text"], scores

            for mask, text, scores in over_pairs(scored):
                examples += int(mask.sum())
                there = real(text[mask])
                tokens += int(there.sum())
                unigram_total -= float(log_frequency[text[mask][there]].sum())
                for mode in self.modes:
                    totals[mode] -= float(finite(scores[mode][mask], f"likelihoods of {source.name}").sum())
            for mode, total in totals.items():
                yield f"{mode}/nll", total / examples
                yield f"{mode}/nll_per_token", total / tokens
                yield f"{mode}/perplexity", float(np.exp(total / tokens))
            yield "unigram/perplexity", float(np.exp(unigram_total / tokens))

        return evaluate


def require_modes(context: Context, evaluator: str, modes: tuple[str, ...]) -> None:
    """Raises UserError where the model can't predict in one of the modes "cap" and "pa"."""
    for mode in modes:
        if mode not in ("cap", "pa"):
            raise UserError(f"{evaluator}: the mode {mode!r} is unknown." + nearest(mode, ("cap", "pa")))
        context.require(Ability.PARALLEL if mode == "pa" else Ability.DECODER, evaluator)


UNIGRAM_EXAMPLES = 20_000


def unigram(context: Context) -> np.ndarray:
    """Log-frequency of each token id in the training captions, (V,) float64."""
    data, counts = context.data, np.ones(context.model.vocab)
    prepared = [name for name, _ in data.parts() if not name.startswith("stream:")]
    if not prepared:
        return np.log(counts / counts.sum())
    tokenizer = context.tokenizer()
    for name in prepared:
        source = sources.open_source(name, data.split, data.directory(), features=("text",), fields=data.fields())
        for record in source.annotations(("text",), range(min(len(source), UNIGRAM_EXAMPLES))):
            for text in record["text"]:
                tokens = tokenizer(text, context.model.length)
                counts += np.bincount(tokens[real(tokens)], minlength=len(counts))
    return np.log(counts / counts.sum())


def open_pairs(context: Context, name: str, split: str, limit: int):
    """The source, and a function that runs another one over its batches of images and tokens (`over_batches`)."""
    crop = Crop.of_model(context.data, context.model, train=False)
    transform = ImageText(crop, context.model.length, context.tokenizer(), flip=False, train=False)
    source = opened_pairs(context, name, split)
    run = functools.partial(over_batches, context, source, transform, what=f"captions of {source.name}", limit=limit)
    return source, run


def opened_pairs(context: Context, name: str, split: str):
    """A data set with images (or clips) and captions; "" is the run's own."""
    data = context.data
    fields = None if name else data.fields()
    return sources.open_source(
        name or data.parts()[0][0], split, data.directory(), features=(context.visual, "text"), fields=fields
    )


def compile_scores(context: Context, *, parallel: bool):
    """jitted (params, (images uint8, texts)) -> log-likelihoods (B,)."""

    return compiled(context.blueprint, parallel_likelihoods if parallel else pair_likelihoods)
