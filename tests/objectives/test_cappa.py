"""CapPa's options: modes, drawing, masking, averaging, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_MODEL, assert_close, drawn

from capvl.errors import UserError
from capvl.models.captioner import CaptionerOptions
from capvl.models.parameters import Blueprint
from capvl.objectives.cappa import CapPa

OPTIONS = CaptionerOptions(**TINY_MODEL)
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model():
    blueprint = Blueprint(OPTIONS)
    return blueprint.bind(drawn(blueprint.shapes))


def batch(n=8, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, OPTIONS.length + 1, n)
    text = np.where(
        np.arange(OPTIONS.length) < lengths[:, None], rng.integers(2, OPTIONS.vocab, (n, OPTIONS.length)), 0
    )
    image = rng.integers(0, 256, (n, OPTIONS.res, OPTIONS.res, 3), np.uint8)
    return {
        "image": jnp.asarray(image),
        "text": jnp.asarray(text, jnp.int32),
        "flip": jnp.zeros(n, bool),
        "mask": jnp.ones(n, bool),
    }


def loss_of(objective, model, raw):
    loss, metrics = jax.jit(lambda b: objective.loss(model, objective.prepare(b, train=True), KEY))(raw)
    return float(loss), {k: float(v) for k, v in metrics.items()}


def test_stratified_is_the_mean_of_its_parts(model):
    raw = batch()
    both, metrics = loss_of(CapPa(pa=0.75, draw="stratified"), model, raw)
    head = {k: v[:6] for k, v in raw.items()}
    tail = {k: v[6:] for k, v in raw.items()}
    pa, cap = loss_of(CapPa(pa=1.0), model, head), loss_of(CapPa(pa=0.0), model, tail)
    assert both == pytest.approx((6 * pa[0] + 2 * cap[0]) / 8, rel=1e-5)
    assert metrics["nll_pa"] == pytest.approx(pa[1]["nll_pa"], rel=1e-5)
    assert metrics["nll_cap"] == pytest.approx(cap[1]["nll_cap"], rel=1e-5)


def test_drawn_share_is_the_asked_one(model):
    objective = CapPa(pa=0.3)
    seen = []

    def spy(model, text, kv, use_pa, key):
        seen.append(use_pa)
        return model.decoder.causal(text, kv)

    object.__setattr__(objective, "hidden_mixed", spy)
    raw = objective.prepare(batch(4), train=True)

    @jax.jit
    def drawn_of(raw, key):
        objective.loss(model, raw, key)
        return seen.pop()

    def expected(key):
        return jax.random.uniform(jax.random.split(key)[1], (4,)) < 0.3

    np.testing.assert_array_equal(drawn_of(raw, KEY), expected(KEY))
    shares = jax.jit(jax.vmap(lambda i: expected(jax.random.fold_in(KEY, i))))(jnp.arange(200))
    assert abs(float(np.mean(shares)) - 0.3) < 0.05


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_mask_ratio(ratio):
    text = batch()["text"]
    masked = np.asarray(CapPa(pa=1.0, mask_ratio=ratio)._masked(text, OPTIONS.vocab, KEY))
    is_mask = masked == OPTIONS.vocab
    assert (is_mask.sum(axis=1) == int(ratio * OPTIONS.length)).all()
    np.testing.assert_array_equal(masked[~is_mask], np.asarray(text)[~is_mask])
    if 0 < ratio < 1:
        assert len(np.unique(is_mask, axis=0)) > 1, "every example is masked at the same places"


@pytest.mark.parametrize("average", ["example", "token"])
def test_padded_batch_equals_unpadded(model, average):
    raw = batch(6)
    padding = {k: jnp.concatenate([v, v[:2]]) for k, v in raw.items()}
    padding["mask"] = jnp.arange(8) < 6
    objective = CapPa(pa=0.0, average=average)
    loss, padded = loss_of(objective, model, raw)[0], loss_of(objective, model, padding)[0]
    expected = loss if average == "token" else loss * 6 / 8
    assert padded == pytest.approx(expected, rel=1e-5)


def test_averages_differ_as_they_should(model):
    raw = batch()
    example = loss_of(CapPa(pa=0.0), model, raw)[0]
    token, metrics = loss_of(CapPa(pa=0.0, average="token"), model, raw)
    assert token == pytest.approx(metrics["nll_cap"], rel=1e-5)
    assert abs(example - token) > 1e-4


def test_longer_padding_changes_nothing(model):
    raw = batch()
    short = int((np.asarray(raw["text"]) != 0).sum(1).max())
    raw["text"] = raw["text"].at[:, short - 1 :].set(0)
    cut = raw | {"text": raw["text"][:, : short - 1]}
    for pa in (0.0,):
        assert loss_of(CapPa(pa=pa), model, raw)[0] == pytest.approx(loss_of(CapPa(pa=pa), model, cut)[0], rel=1e-5)


def test_flip_on_device_in_training_only():
    raw = batch(2) | {"flip": jnp.array([True, False])}
    image = np.asarray(raw["image"], np.float32) / 127.5 - 1
    train = np.asarray(CapPa().prepare(raw, train=True)["image"])
    assert_close(train[0], image[0, :, ::-1], 1e-6)
    assert_close(train[1], image[1], 1e-6)
    assert_close(CapPa().prepare(raw, train=False)["image"], image, 1e-6)


def test_stratified_share_must_be_whole():
    objective = CapPa(pa=0.7, draw="stratified")
    with pytest.raises(UserError, match=r"objective.pa=0.75"):
        objective.check(OPTIONS, 8, 1)
    dataclasses.replace(objective, pa=0.75).check(OPTIONS, 8, 1)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_flops_against_the_compiler(stem):
    """The analytic count is XLA's own to a few percent, for unrolled layers and every token live."""
    options = dataclasses.replace(OPTIONS, encoder="w64d2h2m256/8", stem=stem, unroll=True, length=16)
    blueprint = Blueprint(options)

    def forward(params, image, text):
        return blueprint.bind(params).logits(image, text)

    params = blueprint.shapes
    image = jax.ShapeDtypeStruct((1, options.res, options.res, 3), jnp.float32)
    text = jax.ShapeDtypeStruct((1, options.length), jnp.int32)
    compiled = jax.jit(forward).lower(params, image, text).compile()
    counted = compiled.cost_analysis()["flops"]
    assert options.encoder_flops() + options.decoder_flops() == pytest.approx(counted, rel=0.06)
