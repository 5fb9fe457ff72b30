"""Negative log-likelihood of held-out captions, autoregressive (Cap) and in parallel (Pa)."""

import dataclasses

import jax
import numpy as np

from capvl.data import loader, sources
from capvl.decoding.likelihood import log_likelihood
from capvl.evals import Context, to_host
from capvl.parallel.rules import batch_sharding


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

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require("a decoder", "perplexity")
        source, batches = open_pairs(context, self.name, self.split, self.limit)
        score = {mode: compile_scores(context, parallel=mode == "pa") for mode in self.modes}
        log_frequency = unigram(context)

        def evaluate(params):
            unigram_total = 0.0
            totals = dict.fromkeys(self.modes, 0.0)
            examples = tokens = 0
            for host_batch in batches():
                batch = loader.to_device(host_batch, batch_sharding(context.mesh))
                mask = to_host(batch["mask"])
                examples += int(mask.sum())
                text = to_host(batch["text"])[mask]
                tokens += int((text != 0).sum())
                unigram_total -= float(log_frequency[text[text != 0]].sum())
                for mode in self.modes:
                    totals[mode] -= float(to_host(score[mode](params, batch["image"], batch["text"]))[mask].sum())
            for mode, total in totals.items():
                yield f"{mode}/nll", total / examples
                yield f"{mode}/nll_per_token", total / tokens
                yield f"{mode}/perplexity", float(np.exp(total / tokens))
            yield "unigram/perplexity", float(np.exp(unigram_total / tokens))

        return evaluate


UNIGRAM_EXAMPLES = 20_000


def unigram(context: Context) -> np.ndarray:
    """Log-frequency of each token id in the training captions, (V,) float64."""
    recipe = context.recipe
    counts = np.ones(recipe.model.vocab)
    if recipe.data.name.startswith("stream:"):
        return np.log(counts / counts.sum())
    tokenizer = recipe.tokenizer()
    for name, _ in recipe.data.parts():
        source = sources.open_source(
            name, recipe.data.split, recipe.data.directory(), features=("text",), fields=recipe.data.fields()
        )
        for i in range(min(len(source), UNIGRAM_EXAMPLES)):
            for text in source[i]["text"]:
                tokens = tokenizer(text, recipe.model.length)
                counts += np.bincount(tokens[tokens != 0], minlength=len(counts))
    return np.log(counts / counts.sum())


def open_pairs(context: Context, name: str, split: str, limit: int):
    """The source, and a function that gives its evaluation batches, for the recipe's model and tokenizer."""
    recipe = context.recipe
    transform = recipe.objective.transform(recipe.model, recipe.data, train=False)
    source = opened_pairs(context, name, split, ("image", "text"))
    return source, lambda: loader.eval_batches(source, transform, context.batch, limit=limit)


def opened_pairs(context: Context, name: str, split: str, features: tuple[str, ...]):
    """A data set with images and captions; "" is the recipe's own."""
    data = context.recipe.data
    fields = None if name else data.fields()
    return sources.open_source(name or data.parts()[0][0], split, data.directory(), features=features, fields=fields)


def compile_scores(context: Context, *, parallel: bool):
    """jitted (params, image uint8, text) -> log-likelihoods (B,)."""

    def score(params, image, text):
        model = context.blueprint.bind(params)
        batch = context.recipe.objective.prepare({"image": image, "text": text}, train=False)
        return log_likelihood(model, batch["image"], batch["text"], parallel=parallel)

    return jax.jit(score)
