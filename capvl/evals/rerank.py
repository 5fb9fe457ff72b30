"""The second pass of retrieval: the best candidates of the first are scored pair by pair, and ranked anew.

For scores that look at both sides at once, as image-text matching heads do (ALBEF, arXiv 2107.07651;
X-VLM, 2111.08276): too slow for every pair of a set, so that only the most similar candidates are scored.
"""

import numpy as np

from capvl.evals import Context, finite, to_host
from capvl.evals.sharded import ShardedRows
from capvl.inference.compiled import compiled
from capvl.terminal import progress


def pair_scorer(context: Context, function):
    """The compiled form of (model, rows of queries, rows of candidates) -> scores (B,) of the pairs; images come in
    [-1, 1]."""
    return compiled(context.blueprint, lambda model, rows: function(model, *rows))


def rerank(
    context: Context,
    score,
    params,
    queries: ShardedRows,
    candidates: ShardedRows,
    numbers: np.ndarray,
    what: str = "pairs",
) -> np.ndarray:
    """Scores (N, K) float32 of the K candidates of each query.

    Args:
      context: of the run; pairs are scored context.batch at a time.
      score: of `pair_scorer`.
      params: of the model.
      queries, candidates: what the function needs of either: features, tokens, or pixels, whatever the sets hold.
      numbers: (N, K) candidates of each query (`capvl.evals.sharded.top`).
      what: they are, for messages.

    Raises:
      NotFiniteError: a score is NaN or infinite.
    """
    pairs, size, k = numbers.size, context.batch, numbers.shape[1]
    flat, scores, waiting = numbers.reshape(-1), [], None
    for first in progress(range(0, pairs, size), -(-pairs // size), what):
        index = np.minimum(np.arange(first, first + size), pairs - 1)
        ready, waiting = waiting, score(params, (queries.take(index // k), candidates.take(flat[index])))
        if ready is not None:  # One batch behind, so that the devices need not wait for the host.
            scores.append(to_host(ready))
    scores.append(to_host(waiting))
    return finite(np.concatenate(scores)[:pairs].reshape(numbers.shape), what)


def ranks_of_scores(
    scores: np.ndarray, numbers: np.ndarray, query_groups: np.ndarray, candidate_groups: np.ndarray
) -> np.ndarray:
    """Of each query, how many others of the set come before the best one of its own group: (N,) int.

    These are the candidates of other groups that have at least its score. What is no candidate comes behind all that
    are, equal to each other: where none of its own is among them, all others of the set come before it.

    Args:
      scores, numbers: (N, K), of each query's candidates.
      query_groups, candidate_groups: whole numbers (N,) and (M,): what belongs together has the same.
    """
    query_groups, candidate_groups = np.asarray(query_groups), np.asarray(candidate_groups)
    own = candidate_groups[numbers] == query_groups[:, None]
    best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
    above = ((scores >= best) & ~own).sum(axis=1)
    groups, counts = np.unique(candidate_groups, return_counts=True)
    place = np.searchsorted(groups, query_groups).clip(max=len(groups) - 1)
    others = len(candidate_groups) - np.where(groups[place] == query_groups, counts[place], 0)
    return np.where(own.any(axis=1), above, others)


def recall(ranks: np.ndarray, k: int) -> float:
    """R@k: the share of queries that have fewer than k others before their own."""
    return float((ranks < k).mean())
