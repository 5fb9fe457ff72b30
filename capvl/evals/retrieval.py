"""Image-text retrieval by a two-tower model: recall at 1, 5 and 10, both ways (CLIP, appendix E.2)."""

import dataclasses
import math

import numpy as np

from capvl.data.reading import sources
from capvl.evals import Context, check_limits
from capvl.evals.captions import captions_of
from capvl.evals.encode import tokenize
from capvl.evals.perplexity import opened_pairs
from capvl.evals.rerank import recall
from capvl.evals.sharded import ShardedRows, ranks, shard_images, shard_rows
from capvl.inference.compiled import compiled
from capvl.inference.matching import image_vectors, text_vectors
from capvl.models.abilities import Ability

AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Yields `text/R@k`: the share of images with one of their captions among the k most similar of all
    captions; `image/R@k`: the share of captions whose image is among the k most similar images; and
    `text/chance@k`, `image/chance@k`: the same for a random order.

    A tie with a wrong one counts against the model.

    Attributes:
      name, split: data set; "" for the training set's.
      limit: images; 0 for all.
      captions: of an image, the first so many; 0 for all.
    """

    name: str = ""
    split: str = "val"
    limit: int = 0
    captions: int = 0

    def __post_init__(self):
        check_limits(self, "limit", "captions")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.TEXTS, "retrieval")
        source = opened_pairs(context, self.name, self.split)
        if self.limit:
            source = sources.Subset(source, np.arange(min(self.limit, len(source))))
        embed_image = compiled(context.blueprint, image_vectors)
        embed_text = compiled(context.blueprint, text_vectors)

        def evaluate(params):
            owners, texts = [], []
            for i in range(len(source)):
                own = [t for t in captions_of(source, i) if t.strip()][: self.captions or None]
                owners += [i] * len(own)
                texts += own
            tokens = tokenize(context, texts)
            images = shard_images(context, source, embed_image, params, f"images of {source.name}")
            texts = shard_rows(context, tokens, embed_text, params, f"captions of {source.name}")
            yield from recalls(images, texts, np.array(owners))

        return evaluate


def recalls(images: ShardedRows, texts: ShardedRows, owners: np.ndarray):
    """(name, value) pairs of `Retrieval` from embeddings of N images and M texts, and the image of each text (M,)."""
    numbers = np.arange(images.count)
    counts = np.bincount(owners, minlength=images.count)
    image_ranks = ranks(texts, images, owners, numbers)
    text_ranks = ranks(images, texts, numbers, owners)[counts > 0]
    for k in AT:
        yield f"text/R@{k}", recall(text_ranks, k)
        misses = [math.comb(texts.count - c, k) / max(1, math.comb(texts.count, k)) for c in counts[counts > 0]]
        yield f"text/chance@{k}", 1 - sum(misses) / len(misses)
    for k in AT:
        yield f"image/R@{k}", recall(image_ranks, k)
        yield f"image/chance@{k}", min(1.0, k / images.count)
