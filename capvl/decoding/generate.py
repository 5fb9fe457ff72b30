"""Text on the device with a key-value cache: greedy, sampled, by beams; from a closed vocabulary where asked."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from capvl.decoding import bans
from capvl.decoding.beam import LOW, RULES, Texts, beam_search
from capvl.decoding.names import Names
from capvl.errors import UserError, nearest
from capvl.models.abilities import Ability, abilities
from capvl.nn.padding import lengths


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How text is written: greedily unless there are beams or a temperature.

    Attributes:
      beams: texts that are kept at a time; 1 for none but the best.
      length_penalty: of a beam search; see `capvl.decoding.beam`.
      rule: of a beam search: a key of `capvl.decoding.beam.RULES`.
      temperature: of samples; 0 for none.
      top_k: sample from the k likeliest tokens only; 0 for all.
      top_p: sample from the likeliest tokens whose probabilities reach p (arXiv 1904.09751); 1 for all.
      repetition_penalty: logits of tokens that were written are divided by it, or multiplied where negative
        (arXiv 1909.05858); 1 for none.
      no_repeat: what was just written is not written again at once.
      no_repeat_ngram: how many tokens in a row are not written again if start, prompt and text have them already
        (arXiv 1705.04304, 2.5); 0 for any.
      max_tokens: tokens to write at most, the end included; 0 for as many as the model's texts have.
      min_tokens: tokens to write before the end may come.
    """

    beams: int = 1
    length_penalty: float = 1.0
    rule: str = "hugging_face"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat: bool = False
    no_repeat_ngram: int = 0
    max_tokens: int = 0
    min_tokens: int = 0

    def __post_init__(self):
        if min(self.no_repeat_ngram, self.max_tokens, self.min_tokens) < 0:
            raise UserError("no_repeat_ngram, max_tokens and min_tokens must not be negative; 0 is for none.")
        if self.beams < 1 or self.temperature < 0 or self.top_k < 0:
            raise UserError("beams must be at least 1; temperature and top_k must not be negative.")
        if self.beams > 1 and self.temperature:
            raise UserError("beams and temperature exclude each other.")
        if not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise UserError("top_p must be above 0 and at most 1, and repetition_penalty above 0.")
        if (self.top_k or self.top_p < 1) and not self.temperature:
            raise UserError("top_k and top_p are about samples, which need a temperature above 0.")
        if self.rule not in RULES:
            raise UserError(f"The rule {self.rule!r} of beam search is unknown." + nearest(self.rule, RULES))
        cuts = RULES[self.rule](self.length_penalty).cuts_last()  # Raises where the rule can't have the penalty.
        if self.max_tokens and self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}.")
        if self.max_tokens == self.min_tokens > 0 and cuts and self.beams > 1:
            raise UserError(
                f"The rule {self.rule!r} gives a text's last token for the end, so that min_tokens={self.min_tokens} "
                f"must be below max_tokens={self.max_tokens}."
            )

    def check(self, vocab: int) -> None:
        """Raises UserError where there are more beams than words, or top_k is above their number."""
        if self.beams > vocab - 1:
            raise UserError(f"{self.beams} beams are more than the {vocab - 1} words of the vocabulary.")
        if self.top_k > vocab:
            raise UserError(f"top_k={self.top_k} is more than the {vocab} words of the vocabulary; 0 is for all.")


GREEDY = Decoding()


def planned_length(options, decoding: Decoding, prompt: int, names: Names | None = None) -> int:
    """`generate`'s `length` for a model's texts; everything is checked that can be before any text is written.

    Args:
      options: of the model.
      decoding: how texts are written.
      prompt: tokens of the longest prompt; of no account where the model reads questions by themselves.
      names: that texts are of.

    Raises:
      UserError: the decoder lacks positions for max_tokens or room for min_tokens; more beams than words; no name may
        be written, or one doesn't fit.
    """
    decoding.check(options.vocab)
    if Ability.ANSWERS in abilities(options):
        prompt = 0
    length, positions = options.length, options.text_positions
    if decoding.max_tokens:
        length = prompt + decoding.max_tokens
    if length > positions:
        raise UserError(
            f"max_tokens={decoding.max_tokens} behind a prompt of {prompt} tokens is more than the {positions} "
            f"positions of the model's decoder."
        )
    cut = decoding.beams > 1 and RULES[decoding.rule](decoding.length_penalty).cuts_last()
    room = length - prompt
    if decoding.min_tokens > room - cut:
        raise UserError(
            f"min_tokens={decoding.min_tokens} is more than the {room - cut} tokens that there is room for behind a "
            f"prompt of {prompt}; set max_tokens too."
        )
    if names is not None:
        names.check(room, cut=decoding.max_tokens > 0, **_name_rules(decoding))
    return length


def _name_rules(decoding: Decoding) -> dict[str, Any]:
    return dict(least=decoding.min_tokens, no_repeat=decoding.no_repeat, ngram=decoding.no_repeat_ngram)


def generate(
    model,
    image_kv,
    length: int,
    eos: int,
    decoding: Decoding = GREEDY,
    *,
    prompt_BP=None,
    key=None,
    names: Names | None = None,
    samples: int = 1,
):
    """Writes one text of each image.

    Args:
      model: one with a `decoder` (see `capvl.models.text_decoder.TextDecoder`) and `dtype`.
      image_kv: `model.decoder.image_kv(encoded)` of B images.
      length: most tokens of a text, its prompt included; at most the decoder's positions (see `planned_length`).
      eos: id of the end-of-sentence token; what follows it is 0.
      decoding: how.
      prompt_BP: int32 tokens that each text begins with; 0 behind a prompt that is shorter than others.
      key: of the samples: one, or one of each image.
      names: what is written is one of these; nothing where a row's prompt and `decoding` allow none.
      samples: texts of each image, independent samples; the results then have B * samples rows.

    Returns:
      tokens (B, length) int32 without the prompt, 0 behind their end, and the summed log-probability (B,) float32 of
      what was written.
    """
    rows = image_rows(image_kv) * samples
    if prompt_BP is None:
        prompt_BP = jnp.zeros((rows, 0), jnp.int32)
    elif samples > 1:
        prompt_BP = jnp.repeat(prompt_BP, samples, axis=0)
    if decoding.beams > 1:
        found = n_best(model, image_kv, length, eos, decoding, prompt_BP, names=names)
        return found.tokens[:, 0], found.logp[:, 0]
    forced_BL, key_B = _forced(prompt_BP, length), _row_keys(key, rows, samples)
    tokens_BL, logp_B = _one_by_one(model, image_kv, forced_BL, eos, decoding, key_B, names)
    return without_prompt(tokens_BL, prompt_BP), logp_B


def n_best(model, image_kv, length: int, eos: int, decoding: Decoding, prompt_BP, *, names: Names | None = None):
    """The texts that a beam search of each image ends with, without the prompt; arguments as in `generate`."""
    found = search(model, image_kv, _forced(prompt_BP, length), eos, decoding, names=names)
    rows_RL = found.tokens.reshape(-1, length)
    written_RL = without_prompt(rows_RL, jnp.repeat(prompt_BP, decoding.beams, axis=0))
    return found._replace(tokens=written_RL.reshape(found.tokens.shape))


def _row_keys(key, rows: int, samples: int):
    """A key for each of `rows` rows, `samples` of which are of one image; None without a key."""
    if key is None:
        return None
    if key.ndim == 0:
        key = jax.random.split(key, rows // samples)
    return jax.vmap(lambda k: jax.random.split(k, samples))(key).reshape(-1)


def _forced(prompt_BP, length: int) -> jax.Array:
    return jnp.pad(prompt_BP, ((0, 0), (0, length - prompt_BP.shape[1])))


def image_rows(image_kv) -> int:
    """How many images a decoder's keys and values are of."""
    return jax.tree.leaves(image_kv)[0].shape[1]


def without_prompt(tokens_BL, prompt_BP) -> jax.Array:
    """What was written moves to the front of its row."""
    length = tokens_BL.shape[1]
    index_BL = jnp.arange(length)[None] + lengths(prompt_BP)[:, None]
    written_BL = jnp.take_along_axis(tokens_BL, jnp.minimum(index_BL, length - 1), axis=1)
    return jnp.where(index_BL < length, written_BL, 0)


def with_prompt(prompt_BP, text_BL) -> jax.Array:
    """Texts behind their prompts, (B, P + L) int32, without a gap between."""
    given_B1, width = lengths(prompt_BP)[:, None], prompt_BP.shape[1] + text_BL.shape[1]
    place_1T = jnp.arange(width, dtype=jnp.int32)[None]
    prompt_BT, text_BT = (jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (prompt_BP, text_BL))
    text_BT = jnp.take_along_axis(text_BT, jnp.maximum(place_1T - given_B1, 0), axis=1)
    return jnp.where(place_1T < given_B1, prompt_BT, text_BT)


def search(model, image_kv, forced_BL, eos: int, decoding: Decoding, *, names=None) -> Texts:
    """The best texts of each image by beam search; arguments as in `generate` and `capvl.decoding.beam.beam_search`."""
    step, cache = _stepper(model, image_kv, forced_BL, eos, decoding, names)

    def log_probs(token_R, cache, index, tokens_RL):
        _, logp_RV, cache = step(token_R, cache, index, tokens_RL)
        return logp_RV, cache

    return beam_search(
        log_probs,
        cache,
        forced_BL,
        eos,
        beams=decoding.beams,
        rule=RULES[decoding.rule](decoding.length_penalty),
        batch_axis=1,
        start=model.decoder.start,
        limit_B=_limits(forced_BL, decoding),
    )


def _limits(forced_BL, decoding: Decoding) -> jax.Array:
    """Tokens (B,) that each text has at most, its prompt included."""
    length = forced_BL.shape[1]
    if not decoding.max_tokens:
        return jnp.full((len(forced_BL),), length)
    return jnp.minimum(lengths(forced_BL) + decoding.max_tokens, length)


def _stepper(model, image_kv, forced_BL, eos: int, decoding: Decoding, names: Names | None):
    """(step, its first cache), for as many rows as there are beams of each text. A step gives the logits to choose from
    and the log-probabilities (R, V).

    Log-probabilities are the model's own, LOW where a token must not be written.
    """
    decoder, dtype, beams = model.decoder, model.dtype, decoding.beams
    length, given_B = forced_BL.shape[1], lengths(forced_BL)
    given_R, tree = jnp.repeat(given_B, beams), None
    if names is not None:
        tree, room_B = names.begin(len(given_R)), _limits(forced_BL, decoding) - given_B
        writable_BC = names.writable(forced_BL, room_B, start=decoder.start, **_name_rules(decoding))
        open_RN = jnp.repeat(names.open(writable_BC), beams, axis=0)

    def step(token_R, cache, index, tokens_RL):
        logits_RV, kept = decoder.step(token_R, image_kv, cache[0], index, dtype=dtype)
        vocab = logits_RV.shape[1]
        was_written = index > given_R
        if decoding.repetition_penalty != 1:
            logits_RV = _penalise(logits_RV, tokens_RL, decoding.repetition_penalty)
        banned = jnp.arange(vocab)[None] == 0  # Padding is never written.
        if decoding.no_repeat:
            banned = banned | ((jnp.arange(vocab)[None] == token_R[:, None]) & was_written[:, None])
        logits_RV = jnp.where(banned, LOW, logits_RV)
        logp_RV = jax.nn.log_softmax(logits_RV)
        # What follows is left out without raising the others' probabilities, as in transformers.
        if decoding.no_repeat_ngram:
            n = decoding.no_repeat_ngram
            banned = banned | bans.repeated_ngrams(tokens_RL, index, decoder.start, n, vocab)
        if decoding.min_tokens:
            banned = banned | bans.early_ends(index, given_R, eos, decoding.min_tokens, vocab)
        node = cache[1]
        if names is not None:
            node = jnp.where(was_written, names.advance(node[0], token_R), node[0])[None]
            banned = banned | ~names.mask(node[0], open_RN, vocab)
        logits_RV, logp_RV = (jnp.where(banned, LOW, x) for x in (logits_RV, logp_RV))
        return logits_RV, logp_RV, (kept, node)

    return step, (decoder.init_cache(len(given_R), length, dtype), tree)


def _penalise(logits_RV, tokens_RL, penalty: float) -> jax.Array:
    rows = jnp.arange(len(logits_RV))[:, None]
    written = jnp.zeros(logits_RV.shape, bool).at[rows, tokens_RL].set(True).at[:, 0].set(False)
    return jnp.where(written, jnp.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty), logits_RV)


def _one_by_one(model, image_kv, forced_BL, eos, decoding: Decoding, key_B, names):
    batch, length = forced_BL.shape
    step, cache = _stepper(model, image_kv, forced_BL, eos, decoding, names)
    prompt_B, limit_B = lengths(forced_BL), _limits(forced_BL, decoding)

    def body(carry):
        index, tokens_BL, last_B, done_B, logp_B, cache = carry
        logits_BV, log_probs, cache = step(last_B, cache, index, tokens_BL)
        if not decoding.temperature:
            next_B = jnp.argmax(logits_BV, axis=-1)
        else:
            scaled = _likeliest(logits_BV / decoding.temperature, decoding.top_k, decoding.top_p)
            next_B = jax.vmap(lambda key, x: jax.random.categorical(jax.random.fold_in(key, index), x))(key_B, scaled)
        given_B = forced_BL[:, index]
        is_given_B = index < prompt_B
        done_B = done_B | ((log_probs.max(axis=1) <= LOW / 2) & ~is_given_B)  # Nothing may be written.
        next_B = jnp.where(is_given_B, given_B, jnp.where(done_B, 0, next_B.astype(jnp.int32)))
        chosen = jnp.take_along_axis(log_probs, jnp.maximum(next_B, 1)[:, None], axis=1)[:, 0]
        logp_B = logp_B + jnp.where(done_B | is_given_B, 0.0, chosen)
        tokens_BL = jax.lax.dynamic_update_slice_in_dim(tokens_BL, next_B[:, None], index, axis=1)
        done_B = done_B | ((next_B == eos) & ~is_given_B) | (index + 1 >= limit_B)
        return index + 1, tokens_BL, next_B, done_B, logp_B, cache

    def unfinished(carry):
        return (carry[0] < length) & ~jnp.all(carry[3])

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch, length), jnp.int32),
        jnp.full((batch,), model.decoder.start, jnp.int32),
        jnp.zeros((batch,), bool),
        jnp.zeros((batch,), jnp.float32),
        cache,
    )
    _, tokens_BL, _, _, logp_B, _ = jax.lax.while_loop(unfinished, body, start)
    return tokens_BL, logp_B


def _likeliest(logits_BV, top_k: int, top_p: float) -> jax.Array:
    """Logits, -inf but for the k likeliest tokens, and for the likeliest whose probabilities reach p."""
    if top_k:
        floor = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < floor, -jnp.inf, logits_BV)
    if top_p < 1:
        ordered = -jnp.sort(-logits_BV, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        floor = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < floor, -jnp.inf, logits_BV)
    return logits_BV
