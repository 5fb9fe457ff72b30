"""A BERT that writes: against the golden causal states, and its cache against the whole text at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from flax import nnx
from golden_xvlm import FEATURES, close, load

from capvl.models.bert import BertOptions
from capvl.models.fusion import FusionBert
from capvl.models.fusion_decoder import FusionDecoder
from capvl.nn.padding import real

KINDS = {
    "bert": (dict(), 1),
    "roberta": (dict(pad=1, first_position=2, types=1), 0),
}
VOCAB, IMAGES, PLACES, LENGTH = 23, 2, 5, 6


def decoder_of(kind: str, lower: int | None = None, dropout: float = 0.0) -> FusionDecoder:
    """A tiny one whose weights are all drawn, so that no bias is 0 and attention isn't flat."""
    options, start = KINDS[kind]
    bert = BertOptions("w16d2h2m24", VOCAB, 16, heads="words", dropout=dropout, **options)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: FusionBert(bert, 2, 12, lower=lower, rngs=nnx.Rngs(0))))
    rng, flat = np.random.default_rng(0), {}
    for path, variable in params.flat_state():
        value = 0.3 * rng.normal(size=variable.shape) + (path[-1] == "scale")
        flat[path] = variable.replace(jax.device_put(value.astype(np.float32)))
    return FusionDecoder(nnx.merge(graphdef, nnx.State.from_flat_path(flat)), start)


def causal(decoder: FusionDecoder):
    """Compiled (labels, image, valid, key) -> states."""
    return jax.jit(
        lambda labels, image, valid, key=None: decoder.causal(labels, decoder.image_kv(image, valid), key=key)
    )


def inputs(rows: int):
    image = jax.random.normal(jax.random.key(1), (IMAGES, PLACES, 12))
    valid = jnp.arange(PLACES)[None] < jnp.array([[PLACES], [PLACES - 2]])
    labels = jax.random.randint(jax.random.key(2), (rows, LENGTH), 3, VOCAB)
    return image, valid, labels.at[0, LENGTH - 2 :].set(0)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["text_cross", "text_roberta"])
def test_golden_states(name):
    """Causal ones where the file has them, and those of texts that see themselves whole."""
    case = load(name)
    ids, there = case.ids("in.text_ids"), case.golden["in.text_atts"] > 0
    image, seen = jnp.asarray(case.golden["in.image_embeds"]), case.bools("in.image_atts")
    kinds = {"fusion": dict(mask=real(ids)[:, None, None]), "causal_multi_modal": dict(causal=True)}
    kinds = {kind: how for kind, how in kinds.items() if f"out.{kind}" in case.golden}

    def run(bert):
        decoder = FusionDecoder(bert, 0)
        kv = decoder.image_kv(image, seen)
        return {k: (decoder(ids, kv, **how), bert.word_states(jnp.asarray(case.out(k)))) for k, how in kinds.items()}

    found = case.compute(run)
    assert found
    for kind, (states, expected) in found.items():
        close(states[there], expected[there], FEATURES, kind)


@pytest.mark.parametrize("kind, lower, each", [("bert", None, 3), ("roberta", 0, 1)])
def test_step_by_step_equals_at_once(kind, lower, each):
    decoder = decoder_of(kind, lower)
    rows = IMAGES * each
    image, valid, labels = inputs(rows)

    @jax.jit
    def both():
        kv = decoder.image_kv(image, valid)

        def step(carry, label_R):
            token_R, cache, index = carry
            logits, cache = decoder.step(token_R, kv, cache, index)
            return (label_R, cache, index + 1), logits

        begin = jnp.full(rows, decoder.start, jnp.int32), decoder.init_cache(rows, LENGTH), jnp.zeros((), jnp.int32)
        _, logits_LRV = jax.lax.scan(step, begin, labels.T)
        return jnp.swapaxes(logits_LRV, 0, 1), decoder.project(decoder.causal(labels, kv))

    by_steps, at_once = both()
    assert_close(by_steps, at_once, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_sees_itself_and_those_before_it(kind):
    decoder = decoder_of(kind)
    image, valid, labels = inputs(IMAGES)
    table = decoder.bert.tokens[...]
    one_hot = jax.nn.one_hot(labels, VOCAB)

    def out(one_hot):
        # Tokens as weights of the table, so that there is a derivative by them.
        decoder.embed = lambda ids, places: embedded(one_hot)
        return decoder(labels, decoder.image_kv(image, valid), causal=True)[1].sum(axis=-1)

    def embedded(one_hot):
        bert = decoder.bert
        rows = bert.first_position + jnp.arange(LENGTH)
        return bert.norm(one_hot @ table + (bert.positions[...][rows] + bert.types[...][:1])[None])

    by_token = np.abs(jax.jit(jax.jacrev(out))(one_hot)[:, 1]).sum(axis=-1)
    np.testing.assert_array_equal(by_token > 1e-7, np.tri(LENGTH, dtype=bool))


def test_consecutive_texts_share_an_image():
    run = causal(decoder_of("bert"))
    image, valid, labels = inputs(2 * IMAGES)
    once = run(labels, image, valid)
    twice = run(labels, jnp.repeat(image, 2, axis=0), jnp.repeat(valid, 2, axis=0))
    assert_close(once, twice, 1e-5)
    other = run(labels, image[::-1], valid)
    assert np.abs(other - once).max() > 1e-3


def test_hidden_image_tokens_do_not_matter():
    run = causal(decoder_of("bert"))
    image, valid, labels = inputs(IMAGES)
    changed = jnp.where(valid[:, :, None], image, 7.0)
    a, b = (run(labels, x, valid) for x in (image, changed))
    np.testing.assert_array_equal(a, b)


def test_dropout_is_drawn_by_the_key():
    run = causal(decoder_of("bert", dropout=0.5))
    arrays = inputs(IMAGES)
    still, one, same, two = (
        np.asarray(run(arrays[2], *arrays[:2], None if seed is None else jax.random.key(seed)))
        for seed in (None, 0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != two).any() and (one != still).any()
