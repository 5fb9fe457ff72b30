"""Contrastive objectives: with captions beside, text poolings, padding, and what is frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, drawn

from capvl.errors import UserError
from capvl.models.parameters import Blueprint
from capvl.models.two_towers import TwoTowersOptions
from capvl.objectives.cappa import CapPa
from capvl.objectives.contrastive import Contrastive
from capvl.optim.optimizer import OptimizerOptions, split_trainable

OPTIONS = TwoTowersOptions(
    encoder="w16d2h2m32/16", res=32, dtype="float32", text="w16d1h2m32", vocab=50, length=6, decoder_layers=1
)
KEY = jax.random.key(5)


def model_of(options, **changes):
    blueprint = Blueprint(options)
    return blueprint.bind(drawn(blueprint.shapes) | changes)


def batch(n=6):
    rng = np.random.default_rng(0)
    text = np.where(np.arange(6) < rng.integers(2, 7, (n, 1)), rng.integers(2, 50, (n, 6)), 0)
    return {"image": jnp.asarray(rng.integers(0, 256, (n, 32, 32, 3), np.uint8)), "text": jnp.asarray(text, jnp.int32)}


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_captions_beside_are_cappas_loss(kind):
    """The sum of both losses, each as if it were alone on the same model."""
    model = model_of(OPTIONS)
    objective = Contrastive(loss_kind=kind, caption_weight=2.0, pa=0.0)
    ready = objective.prepare(batch(), train=True)

    @jax.jit
    def losses():
        both, metrics = objective.loss(model, ready, KEY)
        alone = Contrastive(loss_kind=kind).loss(model, ready, KEY)[0]
        captions = CapPa(pa=0.0)
        captions = captions.loss(model, captions.prepare(batch(), train=True), KEY)[0]
        return both, alone, captions, metrics["contrastive"]

    both, alone, captions, metric = losses()
    assert float(both) == pytest.approx(float(alone) + 2 * float(captions), rel=1e-5)
    assert float(metric) == pytest.approx(float(alone), rel=1e-6)


@pytest.mark.parametrize("pool", ["mean", "map", "argmax"])
def test_padding_is_hidden_where_asked(pool):
    """A text's embedding does not depend on how much padding is behind it."""
    options = dataclasses.replace(OPTIONS, text_hides_padding=True, text_pool=pool, decoder_layers=0, length=9)
    if pool == "map":  # The head sees all positions, so hiding is the blocks' alone.
        options = dataclasses.replace(options, text_causal=True, text_pool="first")
    model = model_of(options)
    text = jnp.asarray([[3, 4, 49, 0, 0, 0], [7, 8, 9, 10, 49, 0]], jnp.int32)
    longer = jnp.pad(text, ((0, 0), (0, 3)))
    assert_close(jax.jit(model.embed_text)(longer), jax.jit(model.embed_text)(text), 1e-5)


def test_causal_text_by_gradients():
    options = dataclasses.replace(OPTIONS, text_causal=True, decoder_layers=0)

    def state(positions, place):
        model = model_of(options, **{"text/positions": positions})
        return jnp.square(model.text.hidden(batch()["text"])[:, place]).sum()

    table, gradient = model_of(options).text.positions[...], jax.jit(jax.grad(state))
    for place in (0, 3):
        reaction = np.abs(np.asarray(gradient(table, place))).max(axis=1)
        assert (reaction[place + 1 :] == 0).all() and (reaction[: place + 1] > 0).all()


def test_locked_freezes_the_image_tower_but_its_map_head():
    options = dataclasses.replace(OPTIONS, pool="map", decoder_layers=0)
    shapes = Blueprint(options).shapes
    trainable, frozen = split_trainable(shapes, OptimizerOptions(), Contrastive(locked=True).frozen(options))
    assert {n.split("/")[0] for n in frozen} == {"encoder"}
    assert {n for n in trainable if n.startswith("encoder/")} == {n for n in shapes if n.startswith("encoder/map/")}


def test_flops_of_a_text_tower_against_the_compiler():
    options = dataclasses.replace(OPTIONS, text="w64d2h2m256", length=16, unroll=True, decoder_layers=0)
    blueprint = Blueprint(options)
    text = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    compiled = jax.jit(lambda p, t: blueprint.bind(p).embed_text(t)).lower(blueprint.shapes, text).compile()
    assert options.text_tower_flops() == pytest.approx(compiled.cost_analysis()["flops"], rel=0.06)


def test_bad_options():
    with pytest.raises(UserError, match="loss_kind='sofmax' is unknown. Did you mean 'softmax'"):
        Contrastive(loss_kind="sofmax")
    with pytest.raises(UserError, match="is not an id below"):
        dataclasses.replace(OPTIONS, text_pad=50)
    with pytest.raises(UserError, match="needs model.pool='cls'"):
        dataclasses.replace(OPTIONS, class_position=True)
