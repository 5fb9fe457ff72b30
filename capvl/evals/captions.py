"""Captions that the model writes for held-out images, for the report."""

import dataclasses

import jax
import numpy as np

from capvl.data import loader
from capvl.data import tokenizer as tokenizers
from capvl.decoding.generate import generate
from capvl.errors import UserError
from capvl.evals import Context, Samples, to_host
from capvl.evals.perplexity import open_pairs
from capvl.parallel.rules import batch_sharding


@dataclasses.dataclass(frozen=True)
class Captions:
    """Yields `samples`, and `distinct`: the share of different captions among them.

    Attributes:
      name, split: data set; "" for the training set's.
      count: images.
      temperature: 0 for greedy decoding, else of the samples.
      top_k: sample from the k likeliest tokens; 0 for all.
    """

    name: str = ""
    split: str = "val"
    count: int = 24
    temperature: float = 0.0
    top_k: int = 0

    def __post_init__(self):
        if self.count < 1 or self.temperature < 0 or self.top_k < 0:
            raise UserError("captions: count must be at least 1; temperature and top_k must not be negative.")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        recipe = context.recipe
        _, batches = open_pairs(context, self.name, self.split, self.count)
        tokenizer = tokenizers.load(recipe.data.tokenizer_path())
        key = jax.random.key(recipe.seed) if self.temperature else None

        @jax.jit
        def write(params, image):
            model = context.blueprint.bind(params)
            batch = recipe.objective.prepare({"image": image, "text": np.zeros((len(image), 1), np.int32)}, train=False)
            kv = model.decoder.image_kv(model.encode(batch["image"]))
            return generate(
                model,
                kv,
                recipe.model.length,
                tokenizer.eos,
                key=key,
                temperature=self.temperature or 1.0,
                top_k=self.top_k,
            )[0]

        def evaluate(params):
            images, written, references = [], [], []
            for host_batch in batches():
                batch = loader.to_device(host_batch, batch_sharding(context.mesh))
                mask = to_host(batch["mask"])
                images += list(to_host(batch["image"])[mask])
                written += [tokenizer.decode(t) for t in to_host(write(params, batch["image"]))[mask]]
                references += [tokenizer.decode(t) for t in to_host(batch["text"])[mask]]
            yield "distinct", len(set(written)) / max(len(written), 1)
            yield "samples", Samples(images, written, references)

        return evaluate
