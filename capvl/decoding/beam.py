"""Beam search on the device, with batched prefixes of unequal length, by Hugging Face's rule or those of GIT's code.

Of each step's continuations the best 2 K are looked at: those that end are kept among the K best finished texts, the
best K that don't end go on. What a finished text is worth, which of the 2 K may end, whether finished texts take the
places of others, and when the search is over is the rule's (`RULES`).

Letters: B batch, K beams, R = B K rows, C candidates, L positions, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from capvl.errors import UserError
from capvl.nn.padding import lengths

LOW = -1e9


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """transformers' generation with early_stopping=False.

    A text's score is its log-probability / (tokens written, the end included) ** penalty. Of the best K candidates
    those that end are kept. The search is over when no text that goes on could beat the worst kept one as it is now.

    Attributes:
      penalty: as above.
      per_beam: most continuations of one text; 0 for any number.
      shares_places: finished texts and those that go on are K together.
    """

    penalty: float
    per_beam: ClassVar[int] = 0
    shares_places: ClassVar[bool] = False

    def score(self, logp, before, written) -> jax.Array:
        """Of texts of `before` tokens in all, a start and a prompt included and an end not, `written` of them, an end
        included, by the search; those that are cut at their full length have no end."""
        del before
        return logp / jnp.maximum(written, 1).astype(jnp.float32) ** self.penalty

    def may_end(self, ends_BC, beams: int) -> jax.Array:
        """Which of the candidates, best first, join the finished texts."""
        return ends_BC & (jnp.arange(ends_BC.shape[1])[None] < beams)

    def over_before(self, done_BK, best_B, most_B) -> jax.Array:
        """Whether the search was over before this step's candidates, the best of which has log-probability `best_B`.

        most_B: tokens, start included, that a text may have.
        """
        return jnp.zeros(len(best_B), bool)

    def over_after(self, done_BK, best_B, running_B, before, written_B) -> jax.Array:
        """Whether the search is over after this step.

        Args:
          done_BK: scores of finished texts, best first.
          best_B, running_B: log-probability of the best of this step's candidates, and of the best that goes on.
          before, written_B: as for `score`.
        """
        full_B = (done_BK > LOW / 2).all(axis=1)
        return full_B & (self.score(running_B, before, written_B) <= done_BK[:, -1])

    def cuts_last(self) -> bool:
        """Whether texts that reach their full length end there, their last token given up for the end."""
        return False


@dataclasses.dataclass(frozen=True)
class HuggingFaceWhole(HuggingFace):
    """As transformers was before it left out the prompt (4.12, which X-VLM's code needs): a text's score is its
    log-probability / (its tokens before the end, start and prompt included) ** penalty. The search is over when no
    candidate, whether it ends or not, could beat the worst kept text as it is now."""

    def score(self, logp, before, written) -> jax.Array:
        """See `HuggingFace.score`."""
        del written
        return logp / jnp.asarray(before, jnp.float32) ** self.penalty

    def over_after(self, done_BK, best_B, running_B, before, written_B) -> jax.Array:
        """See `HuggingFace.over_after`."""
        full_B = (done_BK > LOW / 2).all(axis=1)
        return full_B & (self.score(best_B, before, written_B) <= done_BK[:, -1])


@dataclasses.dataclass(frozen=True)
class Official:
    """The search of GIT's code (arXiv 2205.14100).

    A text's score is its log-probability, that of the end included, / ((5 + n) / 6) ** penalty, n being the tokens
    before the end, start and prompt included. Candidates are gone through from the best until K go on; those that end
    on the way are kept. The search is over when the best log-probability at full length could not beat the best kept.
    """

    penalty: float
    per_beam: ClassVar[int] = 0
    shares_places: ClassVar[bool] = False

    def _norm(self, n) -> jax.Array:
        return ((5 + jnp.asarray(n, jnp.float32)) / 6) ** self.penalty

    def score(self, logp, before, written) -> jax.Array:
        """See `HuggingFace.score`."""
        return logp / self._norm(before)

    def may_end(self, ends_BC, beams: int) -> jax.Array:
        """See `HuggingFace.may_end`."""
        going_on = jnp.cumsum((~ends_BC).astype(jnp.int32), axis=1)
        return ends_BC & (going_on < beams)

    def over_before(self, done_BK, best_B, most_B) -> jax.Array:
        """See `HuggingFace.over_before`."""
        return (done_BK[:, 0] > LOW / 2) & (done_BK[:, 0] >= best_B / self._norm(most_B - 1))

    def over_after(self, done_BK, best_B, running_B, before, written_B) -> jax.Array:
        """See `HuggingFace.over_after`."""
        return jnp.zeros(len(running_B), bool)

    def cuts_last(self) -> bool:
        """See `HuggingFace.cuts_last`."""
        return True


@dataclasses.dataclass(frozen=True)
class AllenNlp:
    """The other search of GIT's code, which is AllenNLP's; there it goes with `Decoding.no_repeat`.

    A text's score is its log-probability, whatever its length. Every text has two continuations at most; of these and
    the finished texts the best K stay. The search is over when all of them are finished.

    Raises:
      UserError: a penalty other than 1: there is none.
    """

    penalty: float
    per_beam: ClassVar[int] = 2
    shares_places: ClassVar[bool] = True

    def __post_init__(self):
        if self.penalty != 1:
            raise UserError(
                f"The rule 'allennlp' has no length penalty: leave length_penalty at 1, not {self.penalty}."
            )

    def score(self, logp, before, written) -> jax.Array:
        """See `HuggingFace.score`."""
        del before, written
        return logp

    def may_end(self, ends_BC, beams: int) -> jax.Array:
        """See `HuggingFace.may_end`."""
        return ends_BC

    def over_before(self, done_BK, best_B, most_B) -> jax.Array:
        """See `HuggingFace.over_before`."""
        return jnp.zeros(len(best_B), bool)

    def over_after(self, done_BK, best_B, running_B, before, written_B) -> jax.Array:
        """See `HuggingFace.over_after`."""
        return running_B <= LOW / 2

    def cuts_last(self) -> bool:
        """See `HuggingFace.cuts_last`."""
        return False


RULES = {
    "hugging_face": HuggingFace,
    "hugging_face_whole": HuggingFaceWhole,
    "official": Official,
    "allennlp": AllenNlp,
}


class Texts(NamedTuple):
    """Results of a search, best first.

    Attributes:
      tokens: (B, K, L) int32, with what was forced.
      scores: (B, K) float32 by the rule; LOW where there are not so many.
      logp: (B, K) summed log-probability of what was written.
    """

    tokens: jax.Array
    scores: jax.Array
    logp: jax.Array


class _State(NamedTuple):
    """Running texts (R, L) with their log-probabilities, and the K best finished ones of each example."""

    index: jax.Array
    tokens_BKL: jax.Array
    logp_BK: jax.Array
    done: Texts
    stopped_B: jax.Array
    cache: Any


def beam_search(
    step: Callable[[jax.Array, Any, jax.Array, jax.Array], tuple[jax.Array, Any]],
    cache: Any,
    forced_BL: jax.Array,
    eos: int,
    *,
    beams: int,
    rule: HuggingFace | Official | AllenNlp,
    batch_axis: int = 0,
    start: int | None = 0,
    limit_B: jax.Array | None = None,
) -> Texts:
    """The best texts of each example.

    Args:
      step: (last tokens (R,), cache, index, tokens so far (R, L)) -> (log-probabilities (R, V) of position `index`,
        cache).
      cache: pytree whose leaves have rows R on `batch_axis`.
      forced_BL: tokens that each text begins with, 0 behind them; L is the most tokens.
      eos: id that ends a text; what follows it is 0.
      beams: K.
      rule: a value of RULES.
      batch_axis: of the cache's leaves.
      start: token that is read before the first position; None where the forced tokens begin with it.
      limit_B: tokens at which each example's texts are at their full length, what is forced included; None for L.
    """
    batch, length = forced_BL.shape
    prefix_B, own = lengths(forced_BL), int(start is not None)
    limit_B = jnp.full((batch,), length) if limit_B is None else limit_B

    def body(state: _State) -> _State:
        index, before = state.index, state.index + own
        last_BK = jnp.where(index > 0, state.tokens_BKL[:, :, jnp.maximum(index - 1, 0)], start or 0)
        logp_RV, cache = step(last_BK.reshape(-1), state.cache, index, state.tokens_BKL.reshape(-1, length))
        best_logp, beam, token, given_B1 = _candidates(
            state, logp_RV, forced_BL[:, index], index < prefix_B, prefix_B == index, rule.per_beam
        )
        rows = jnp.take_along_axis(state.tokens_BKL, beam[:, :, None], axis=1)
        full_B = index + 1 >= limit_B
        ends = ((token == eos) & ~given_B1) | full_B[:, None]
        token = jnp.where(ends & ~given_B1, eos, token) if rule.cuts_last() else token
        rows = jax.lax.dynamic_update_slice_in_dim(rows, token[:, :, None], index, axis=2)

        stopped_B = state.stopped_B | rule.over_before(state.done.scores, best_logp[:, 0], limit_B + own)
        written_B, before_BC = index + 1 - prefix_B, before + (token != eos).astype(jnp.int32)
        may_end = rule.may_end(ends, beams) & ~stopped_B[:, None] & (best_logp > LOW / 2)
        scores = jnp.where(may_end, rule.score(best_logp, before_BC, written_B[:, None]), LOW)
        done = _keep_best(state.done, Texts(rows, scores, best_logp))

        # The best K that don't end go on.
        running_logp, running = jax.lax.top_k(jnp.where(ends, LOW, best_logp), beams)
        if rule.shares_places:
            done, running_logp = _share_places(done, running_logp)
        cache = _rows_of_parents(cache, jnp.take_along_axis(beam, running, axis=1), batch_axis)
        tokens = jnp.take_along_axis(rows, running[:, :, None], axis=1)
        over_B = rule.over_after(done.scores, best_logp[:, 0], running_logp[:, 0], before, written_B)
        return _State(index + 1, tokens, running_logp, done, stopped_B | over_B | full_B, cache)

    begin = _begin(batch, beams, length, cache)
    return jax.lax.while_loop(lambda state: (state.index < length) & ~jnp.all(state.stopped_B), body, begin).done


def _rows_of_parents(cache, parent_BK, batch_axis: int):
    """The cache's rows of the texts that go on: of each the beam that it comes from."""
    batch, beams = parent_BK.shape
    row_R = (jnp.arange(batch)[:, None] * beams + parent_BK).reshape(-1)
    return jax.tree.map(lambda x: jnp.take(x, row_R, axis=batch_axis), cache)


def _candidates(state: _State, logp_RV, given_B, is_given_B, first_B, per_beam: int):
    """The best 2 K continuations: summed log-probability, beam, token (B, C); and whether the token is given (B, 1).

    At most `per_beam` of a beam, unless it is the first token, which only one beam goes on with.
    """
    batch, beams = state.logp_BK.shape
    vocab = logp_RV.shape[1]
    given_B1 = is_given_B[:, None]
    only_given = jnp.where(jnp.arange(vocab)[None, None] == given_B[:, None, None], 0.0, LOW)
    logp_BKV = jnp.maximum(logp_RV.astype(jnp.float32), LOW).reshape(batch, beams, vocab)
    if per_beam:
        least_BK1 = jax.lax.top_k(logp_BKV, min(per_beam, vocab))[0][..., -1:]
        logp_BKV = jnp.where((logp_BKV < least_BK1) & ~first_B[:, None, None], LOW, logp_BKV)
    total = state.logp_BK[:, :, None] + jnp.where(given_B1[..., None], only_given, logp_BKV)
    best_logp, best = jax.lax.top_k(total.reshape(batch, -1), min(2 * beams, beams * vocab))
    return best_logp, best // vocab, (best % vocab).astype(jnp.int32), given_B1


def _share_places(done: Texts, running_BK) -> tuple[Texts, jax.Array]:
    """Of finished texts and those that go on only the K best are left."""
    together = jnp.concatenate([done.scores, running_BK], axis=1)
    least_B1 = jax.lax.top_k(together, running_BK.shape[1])[0][:, -1:]
    done_BK, running_BK = (jnp.where(x < least_B1, LOW, x) for x in (done.scores, running_BK))
    return done._replace(scores=done_BK), running_BK


def _keep_best(kept: Texts, new: Texts) -> Texts:
    """The K best of kept and new texts, in order."""
    both = [jnp.concatenate(pair, axis=1) for pair in zip(kept, new, strict=True)]
    scores, chosen = jax.lax.top_k(both[1], kept.scores.shape[1])
    tokens = jnp.take_along_axis(both[0], chosen[:, :, None], axis=1)
    return Texts(tokens, scores, jnp.take_along_axis(both[2], chosen, axis=1))


def _begin(batch: int, beams: int, length: int, cache) -> _State:
    """Only the first of the K equal texts counts at first, or all would go on alike."""
    first_only = jnp.where(jnp.arange(beams)[None] == 0, 0.0, LOW)
    blank = jnp.zeros((batch, beams, length), jnp.int32)
    done = Texts(blank, jnp.full((batch, beams), LOW, jnp.float32), jnp.zeros((batch, beams), jnp.float32))
    running = jnp.broadcast_to(first_only, (batch, beams))
    return _State(jnp.zeros((), jnp.int32), blank, running, done, jnp.zeros((batch,), bool), cache)
