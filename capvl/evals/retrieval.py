"""Image-text retrieval by a two-tower model: recall at 1, 5 and 10, both ways (CLIP, appendix E.2)."""

import dataclasses
import math

import numpy as np

from capvl.data.reading import sources
from capvl.evals import Context, check_limits, finite
from capvl.evals.captions import captions_of
from capvl.evals.encode import over_images, over_texts
from capvl.evals.perplexity import opened_pairs
from capvl.inference.compiled import compiled
from capvl.inference.matching import image_vectors, text_vectors
from capvl.models.abilities import Ability

AT = (1, 5, 10)
ROWS = 1024


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
            images, _ = over_images(context, source, embed_image, params, f"images of {source.name}")
            texts = over_texts(context, texts, embed_text, params, f"captions of {source.name}")
            yield from recalls(images, texts, np.array(owners))

        return evaluate


def recalls(images: np.ndarray, texts: np.ndarray, owners: np.ndarray):
    """(name, value) pairs of `Retrieval` from embeddings (N, E), (M, E) and the image of each text (M,)."""
    images, texts = finite(images, "images' embeddings"), finite(texts, "texts' embeddings")
    image_ranks, text_ranks = [], []
    for first in range(0, len(texts), ROWS):
        owner = owners[first : first + ROWS]
        similar = texts[first : first + ROWS] @ images.T
        own = np.take_along_axis(similar, owner[:, None], axis=1)
        image_ranks.append((similar >= own).sum(axis=1) - 1)
    for first in range(0, len(images), ROWS):
        similar = images[first : first + ROWS] @ texts.T
        mine = owners[None] == np.arange(first, first + len(similar))[:, None]
        best = np.where(mine, similar, -np.inf).max(axis=1, keepdims=True)
        text_ranks.append(((similar >= best) & ~mine).sum(axis=1))
    counts = np.bincount(owners, minlength=len(images))
    image_ranks, text_ranks = np.concatenate(image_ranks), np.concatenate(text_ranks)[counts > 0]
    for k in AT:
        yield f"text/R@{k}", float((text_ranks < k).mean())
        misses = [math.comb(len(texts) - c, k) / max(1, math.comb(len(texts), k)) for c in counts[counts > 0]]
        yield f"text/chance@{k}", 1 - sum(misses) / len(misses)
    for k in AT:
        yield f"image/R@{k}", float((image_ranks < k).mean())
        yield f"image/chance@{k}", min(1.0, k / len(images))
