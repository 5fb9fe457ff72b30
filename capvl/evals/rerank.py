"""The second pass of retrieval: the best candidates of the first are scored pair by pair, and ranked anew.

For scores that look at both sides at once, as image-text matching heads do (ALBEF, arXiv 2107.07651;
X-VLM, 2111.08276): too slow for every pair of a set, so that only the most similar candidates are scored.
"""

import numpy as np

from capvl.evals import Context, finite, to_host
from capvl.evals.sharded import ShardedRows
from capvl.inference.compiled import compiled
from capvl.terminal import progress


def rerank(
    context: Context,
    function,
    params,
    queries: ShardedRows,
    candidates: ShardedRows,
    numbers: np.ndarray,
    what: str = "pairs",
) -> np.ndarray:
    """Scores (N, K) float32 of the K candidates of each query.

    Args:
      context: of the run; pairs are scored context.batch at a time.
      function: (model, rows of queries, rows of candidates) -> scores (B,) of the pairs; images come in [-1, 1].
      params: of the model.
      queries, candidates: what the function needs of either: features, tokens, or pixels, whatever the sets hold.
      numbers: (N, K) candidates of each query (`capvl.evals.sharded.top`).
      what: they are, for messages.

    Raises:
      NotFiniteError: a score is NaN or infinite.
    """
    score = compiled(context.blueprint, lambda model, rows: function(model, *rows))
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
    """Of each query, how many of its candidates of other groups have at least the score that the best one of its own
    group has: (N,) int. A query without one of its own among them has the number of all candidates of the set.

    Args:
      scores, numbers: (N, K), of each query's candidates.
      query_groups, candidate_groups: whole numbers (N,) and (M,): what belongs together has the same.
    """
    own = np.asarray(candidate_groups)[numbers] == np.asarray(query_groups)[:, None]
    best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
    above = ((scores >= best) & ~own).sum(axis=1)
    return np.where(own.any(axis=1), above, len(candidate_groups))


def recall(ranks: np.ndarray, k: int) -> float:
    """R@k: the share of queries that have fewer than k others before their own."""
    return float((ranks < k).mean())
