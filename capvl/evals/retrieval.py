"""Image-text retrieval: recall at 1, 5 and 10, both ways (CLIP, appendix E.2), by the cosines of two towers; or by
these and then by a matching head that ranks the best candidates anew (X-VLM, arXiv 2111.08276, section 4.4)."""

import dataclasses
import math

import numpy as np

from capvl.data.reading import sources
from capvl.evals import Context, check_limits
from capvl.evals.captions import captions_of_all
from capvl.evals.encode import tokenize
from capvl.evals.perplexity import opened_pairs
from capvl.evals.rerank import pair_scorer, ranks_of_scores, recall, rerank
from capvl.evals.sharded import ShardedRows, ranks, shard_images, shard_rows, top
from capvl.inference.compiled import compiled
from capvl.inference.matching import image_vectors, text_vectors
from capvl.models.abilities import Ability

AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Yields `text/R@k`: the share of images with one of their captions among the k most similar of all
    captions; `image/R@k`: the share of captions whose image is among the k most similar images; and
    `text/chance@k`, `image/chance@k`: the same for a random order. `mean` is the mean of the six. With `rerank` also
    `text/rerank/R@k`, `image/rerank/R@k` and `rerank/mean`: the same of the second pass.

    A tie with a wrong one counts against the model.

    Attributes:
      name, split: data set; "" for the training set's.
      limit: images; 0 for all.
      captions: of an image, the first so many; 0 for all.
      rerank: so many of the most similar are scored pair by pair by the matching head; 0 for none. The paper takes 256
        of COCO's and 128 of Flickr30k's.
    """

    name: str = ""
    split: str = "val"
    limit: int = 0
    captions: int = 0
    rerank: int = 0

    def __post_init__(self):
        check_limits(self, "limit", "captions", "rerank")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.TEXTS, "retrieval")
        source = opened_pairs(context, self.name, self.split)
        if self.limit:
            source = sources.Subset(source, np.arange(min(self.limit, len(source))))
        if self.rerank:
            context.require(Ability.MATCHES, "retrieval with rerank")
        embed_image = compiled(context.blueprint, _image_rows if self.rerank else image_vectors)
        embed_text = compiled(context.blueprint, _text_rows if self.rerank else text_vectors)
        match = pair_scorer(context, _match)

        def evaluate(params):
            owners, texts = [], []
            for i, every in enumerate(captions_of_all(source)):
                own = [t for t in every if t.strip()][: self.captions or None]
                owners += [i] * len(own)
                texts += own
            tokens = tokenize(context, texts)
            images = shard_images(context, source, embed_image, params, f"images of {source.name}")
            texts = shard_rows(context, tokens, embed_text, params, f"captions of {source.name}")
            owners = np.array(owners)
            if not self.rerank:
                yield from recalls(images, texts, owners)
                return
            yield from recalls(_part(images, "vector"), _part(texts, "vector"), owners)
            yield from reranked(context, params, match, images, texts, owners, self.rerank)

        return evaluate


def _image_rows(model, image_BRRC):
    tokens_BNC = model.encode(image_BRRC)
    return {"vector": model.embed_tokens(tokens_BNC), "rows": tokens_BNC}


def _text_rows(model, text_BL):
    states_BLD = model.states(text_BL)
    return {"vector": model.embed_states(states_BLD), "rows": {"text": text_BL, "states": states_BLD}}


def _match(model, one, other):
    """Scores of pairs of an image's and a text's rows, whichever comes first."""
    image_BNC, text = (other, one) if isinstance(one, dict) else (one, other)
    return model.match(image_BNC, text["text"], states_BLD=text["states"])


def _part(rows: ShardedRows, name: str) -> ShardedRows:
    return dataclasses.replace(rows, rows=rows.rows[name])


def recalls(images: ShardedRows, texts: ShardedRows, owners: np.ndarray):
    """(name, value) pairs of `Retrieval` from embeddings of N images and M texts, and the image of each text (M,)."""
    numbers = np.arange(images.count)
    counts = np.bincount(owners, minlength=images.count)
    image_ranks = ranks(texts, images, owners, numbers)
    text_ranks = ranks(images, texts, numbers, owners)[counts > 0]
    yield "mean", float(np.mean([recall(found, k) for found in (text_ranks, image_ranks) for k in AT]))
    for k in AT:
        yield f"text/R@{k}", recall(text_ranks, k)
        misses = [math.comb(texts.count - c, k) / max(1, math.comb(texts.count, k)) for c in counts[counts > 0]]
        yield f"text/chance@{k}", 1 - sum(misses) / len(misses)
    for k in AT:
        yield f"image/R@{k}", recall(image_ranks, k)
        yield f"image/chance@{k}", min(1.0, k / images.count)


def reranked(context: Context, params, match, images: ShardedRows, texts: ShardedRows, owners: np.ndarray, k: int):
    """(name, value) pairs of the second pass.

    Args:
      context, params: of the run.
      match: scores pairs (`rerank.pair_scorer`).
      images, texts: `vector` and `rows` of N images and M texts.
      owners: the image of each text, (M,).
      k: candidates of a query.
    """
    numbers, means = np.arange(images.count), []
    sides = ("text", images, texts, numbers, owners), ("image", texts, images, owners, numbers)
    for side, queries, candidates, *groups in sides:
        chosen, _ = top(_part(queries, "vector"), _part(candidates, "vector"), k)
        rows = _part(queries, "rows"), _part(candidates, "rows")
        scores = rerank(context, match, params, *rows, chosen, f"pairs that rank each {side}")
        found = ranks_of_scores(scores, chosen, *groups)[np.isin(groups[0], groups[1])]
        for at in AT:
            means.append(recall(found, at))
            yield f"{side}/rerank/R@{at}", means[-1]
    yield "rerank/mean", float(np.mean(means))
