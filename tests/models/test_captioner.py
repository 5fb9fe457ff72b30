"""The captioner's properties that hold whatever its weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_MODEL, assert_close, drawn

from capvl.decoding.generate import Decoding, generate
from capvl.models.captioner import CaptionerOptions
from capvl.models.parameters import Blueprint

LENGTH = TINY_MODEL["length"]


def build(**changes):
    """Every parameter is random: zero-initialised layers would hide errors."""
    blueprint = Blueprint(CaptionerOptions(**(TINY_MODEL | changes)))
    norms = {name: shape for name, shape in blueprint.shapes.items() if "norm" in name}
    return blueprint, drawn(blueprint.shapes) | drawn(norms, 1.0)


def inputs(batch=3, seed=0):
    rng = np.random.default_rng(seed)
    res = TINY_MODEL["res"]
    image = jnp.asarray(rng.uniform(-1, 1, (batch, res, res, 3)), jnp.float32)
    return image, jnp.asarray(rng.integers(1, TINY_MODEL["vocab"], (batch, LENGTH)), jnp.int32)


def test_causality_by_gradients():
    blueprint, params = build()
    image, text = inputs()

    @jax.jit
    def sensitivity(position):
        """How logits at `position` react to each decoder position embedding."""

        def logit(table):
            model = blueprint.bind(params | {"decoder/positions": table})
            return jnp.sum(model.logits(image, text)[:, position] ** 2)

        return jnp.abs(jax.grad(logit)(params["decoder/positions"])).max(axis=-1)

    for position in (0, 4, LENGTH - 1):
        reaction = np.asarray(sensitivity(position))
        assert (reaction[position + 1 :] == 0).all(), f"logits at {position} see later positions"
        assert (reaction[: position + 1] > 0).all(), f"logits at {position} miss an earlier position"


def test_parallel_prediction_sees_no_text():
    blueprint, params = build()
    image, text = inputs()
    model = blueprint.bind(params)
    other = jnp.roll(text, 1, axis=1)
    logits = jax.jit(lambda t: model.logits(image, t, parallel=True))
    np.testing.assert_array_equal(logits(text), logits(other))
    swapped = jax.jit(lambda i: model.logits(i, text, parallel=True))
    assert np.abs(np.asarray(swapped(image) - swapped(jnp.roll(image, 1, axis=0)))).max() > 1e-3


def test_parallel_short_cut_equals_the_plain_decoder():
    blueprint, params = build(decoder_layers=3)
    model = blueprint.bind(params)
    image, text = inputs()

    @jax.jit
    def both(image):
        kv = model.decoder.image_kv(model.encode(image))
        plain = model.decoder(jnp.full_like(text, model.decoder.vocab), kv)
        return plain, model.decoder.parallel(LENGTH, kv)

    plain, short = both(image)
    assert_close(short, plain, 1e-5)


@pytest.mark.parametrize("length", [LENGTH, 5])
def test_cached_greedy_decoding_equals_recomputing(length):
    blueprint, params = build()
    model = blueprint.bind(params)
    image, _ = inputs(4)
    eos = 7

    @jax.jit
    def cached(image):
        return generate(model, model.decoder.image_kv(model.encode(image)), length, eos)

    tokens, log_prob = map(np.asarray, cached(image))
    logits_of = jax.jit(lambda text: model.logits(image, text))
    text = np.zeros((4, LENGTH), np.int32)
    expected = np.zeros(4)
    done = np.zeros(4, bool)
    for i in range(length):
        logits = np.asarray(logits_of(jnp.asarray(text)), np.float64)[:, i]
        log_probs = logits.copy()
        log_probs[:, 0] = -np.inf
        log_probs -= np.log(np.exp(log_probs - log_probs.max(1, keepdims=True)).sum(1, keepdims=True)) + log_probs.max(
            1, keepdims=True
        )
        best = np.where(done, 0, log_probs.argmax(1))
        expected += np.where(done, 0, log_probs.max(1))
        text[:, i] = best
        done |= best == eos
    np.testing.assert_array_equal(tokens, text[:, :length])
    assert_close(log_prob, expected, 1e-4)


def test_sampling_is_a_function_of_the_key():
    blueprint, params = build()
    model = blueprint.bind(params)
    image, _ = inputs(4)

    @jax.jit
    def sample(key):
        return generate(
            model, model.decoder.image_kv(model.encode(image)), LENGTH, 1, Decoding(temperature=1.0, top_k=5), key=key
        )[0]

    first, again, other = (np.asarray(sample(jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    "changes, tokens",
    [({}, 4), ({"pool": "map"}, 4), ({"pool": "cls"}, 5), ({"registers": 3}, 4), ({"registers": 2, "pool": "cls"}, 5)],
)
def test_tokens_and_features(changes, tokens):
    blueprint, params = build(**changes)
    model = blueprint.bind(params)
    image, _ = inputs()
    assert jax.eval_shape(model.encode, image).shape == (3, tokens, 16)
    assert jax.eval_shape(model.features, image).shape == (3, 16)


def test_patch_dropout_only_in_training():
    blueprint, params = build(patch_dropout=0.5)
    model = blueprint.bind(params)
    image, _ = inputs()
    assert model.encode(image).shape[1] == 4
    assert model.encode(image, key=jax.random.key(0)).shape[1] == 2


def test_bfloat16_is_close_to_float32():
    image, text = inputs()
    logits = []
    for dtype in ("float32", "bfloat16"):
        blueprint, params = build(dtype=dtype)
        model = blueprint.bind(params)
        logits.append(np.asarray(jax.jit(model.logits)(image, text)))
        assert logits[-1].dtype == np.float32
    assert_close(logits[1], logits[0], 0.1)


def test_sincos_has_no_position_parameters():
    blueprint, _ = build(positions="sincos")
    assert "encoder/positions" not in blueprint.shapes
