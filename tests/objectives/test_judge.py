"""Statements about one image or two, and text assignment: what is drawn, the losses, and training on tiny scenes."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close, drawn

from capvl import recipes, train
from capvl.checkpoint import Checkpointer
from capvl.errors import UserError
from capvl.models.parameters import Blueprint
from capvl.models.xvlm_judge import JudgeOptions
from capvl.objectives import judge
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding

TINY = dict(encoder="w16d1h2m32/16", res=32, dtype="float32", text="w16d2h2m32", cross_layers=1, unroll=True)
TINY |= dict(vocab=128, length=12, text_positions=12, dropout=0.0)
ASSIGN = TINY | dict(images=2, classes=judge.ASSIGNED, head="linear", projection=8)
KEY = jax.random.key(3)


def model_of(**options):
    blueprint = Blueprint(JudgeOptions(**options))
    return blueprint.bind(drawn(blueprint.shapes))


def texts(rows, length=12):
    rng = np.random.default_rng(1)
    ids = rng.integers(2, 128, (rows, length))
    return jnp.asarray(np.where(np.arange(length) < rng.integers(3, length, (rows, 1)), ids, 0), jnp.int32)


def images(*shape):
    return jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (*shape, 32, 32, 3)), jnp.float32)


def test_the_second_image_is_seen_and_is_not_the_first():
    model = model_of(**TINY, images=2, classes=("False", "True"))
    image, text = images(2, 2), texts(2)[:, None]
    logits = jax.jit(lambda image: model.judge(image, text))
    swapped = logits(image[:, ::-1])
    assert np.abs(logits(image) - swapped).max() > 1e-3
    assert np.abs(logits(image) - logits(image.at[:, 1].set(0.0))).max() > 1e-3


def test_several_texts_of_an_image_are_judged_each_for_itself():
    model = model_of(**TINY)
    image, text = images(2, 1), texts(6).reshape(2, 3, 12)
    together = jax.jit(model.judge)(image, text)
    alone = jax.jit(model.judge)(jnp.repeat(image, 3, axis=0), text.reshape(6, 1, 12))
    assert_close(together.reshape(6, 1, 3), alone, 1e-5)


@pytest.mark.long
def test_it_learns_which_side_is_bright():
    """One text, true of pairs whose left image is brighter: nothing but the images' order tells."""
    blueprint = Blueprint(JudgeOptions(**TINY, images=2, classes=("False", "True")))
    label = jnp.arange(16, dtype=jnp.int32)[:, None] % 2
    bright = 0.4 * jnp.stack([label[:, 0], 1 - label[:, 0]], axis=1).astype(jnp.float32)
    image = 0.2 * images(16, 2) + bright[:, :, None, None, None]
    batch = dict(image=image, text=jnp.repeat(texts(1)[None], 16, axis=0), label=label, weights=jnp.ones((16, 1)))
    adam = optax.adam(3e-3)

    @jax.jit
    def step(state, _):
        params, moments = state
        (_, metrics), gradients = jax.value_and_grad(
            lambda p: judge.Judge().loss(blueprint.bind(p), batch, None), has_aux=True
        )(params)
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it.
            updates, moments = adam.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), metrics["accuracy"].value()

    params = blueprint.init(jax.random.key(0))
    _, accuracy = jax.lax.scan(step, (params, adam.init(params)), None, length=120)
    assert accuracy[0] < 0.8 and accuracy[-1] == 1.0


def test_empty_slots_weigh_nothing():
    """Two examples of three and one statement equal the mean of four by themselves, in halves as in the whole."""
    model, objective = model_of(**TINY), judge.Judge(texts=3)
    slots = np.array([[True, True, True], [True, False, False]])
    label = np.array([[0, 1, 2], [1, 0, 0]], np.int32)
    batch = dict(image=images(2, 1), flip=np.zeros((2, 1), bool), text=texts(6).reshape(2, 3, 12))
    ready = objective.prepare(batch | dict(label=jnp.asarray(label), slots=jnp.asarray(slots)), train=True)
    loss_of = jax.jit(lambda batch: objective.loss(model, batch, None))
    loss, metrics = loss_of(ready)
    log_p = np.asarray(jax.nn.log_softmax(jax.jit(model.judge)(batch["image"], batch["text"])))[slots]
    assert float(loss) == pytest.approx(-np.mean(log_p[np.arange(4), label[slots]]), rel=1e-5)
    right = np.mean(np.argmax(log_p, axis=-1) == label[slots])
    assert float(metrics["accuracy"]) == pytest.approx(right)
    halves = [loss_of(jax.tree.map(lambda x, i=i: x[i : i + 1], ready))[0] for i in range(2)]
    assert float(loss) == pytest.approx(float(sum(halves)) / 2, rel=1e-5)


def test_draws_of_pairs():
    """Two thirds of the texts have their own image, in either place; others come by their weight, never twice."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1, 5, 8))
    features = jnp.asarray(0.5 * features / np.linalg.norm(features, axis=-1, keepdims=True), jnp.float32)
    logits = judge.similarities(features)
    draws = jax.jit(jax.vmap(lambda key: judge.draw_pairs(logits, key)))
    pairs, labels = (np.asarray(x)[:, 0] for x in draws(jax.random.split(KEY, 6000)))
    own = np.arange(5)[None]
    assert ((pairs == own[..., None]).sum(axis=-1) == (labels < 2)).all()
    assert (pairs[labels == 0][:, 0] == np.broadcast_to(own, labels.shape)[labels == 0]).all()
    assert (pairs[labels == 1][:, 1] == np.broadcast_to(own, labels.shape)[labels == 1]).all()
    assert (pairs[..., 0] != pairs[..., 1]).all()
    np.testing.assert_allclose([(labels == k).mean() for k in range(3)], 1 / 3, atol=0.01)
    weights = np.asarray(jax.nn.softmax(logits[0]))
    first = [(pairs[:, 0][labels[:, 0] == 0][:, 1] == j).mean() for j in range(5)]
    np.testing.assert_allclose(first, weights[0], atol=0.03)
    # The second of two others: by its weight among what the first leaves.
    second = [(pairs[:, 0][labels[:, 0] == 2][:, 1] == j).mean() for j in range(5)]
    expected = sum(weights[0, i] * np.where(np.arange(5) == i, 0, weights[0]) / (1 - weights[0, i]) for i in range(5))
    np.testing.assert_allclose(second, expected, atol=0.03)


@pytest.mark.long
def test_text_assignment_on_eight_devices_is_that_on_one():
    """The loss and its gradients; what is drawn stays within a device."""
    objective = judge.TextAssignment(among=4)
    blueprint = Blueprint(JudgeOptions(**ASSIGN))
    batch = {"image": images(32), "text": texts(32)}

    def gradients(count):
        mesh = make_mesh(MeshOptions(), jax.devices()[:count])
        with jax.set_mesh(mesh):
            params = jax.jit(blueprint.init, out_shardings=blueprint.shardings(mesh))(jax.random.key(0))
            sharded = jax.device_put(batch, batch_sharding(mesh))
            step = jax.jit(jax.value_and_grad(lambda p, b: objective.loss(blueprint.bind(p), b, KEY)[0]))
            return jax.device_get(step(params, sharded))

    (one, of_one), (eight, of_eight) = gradients(1), gradients(8)
    assert one == pytest.approx(eight, rel=1e-5)
    for name, gradient in of_one.items():
        assert_close(of_eight[name], gradient, 2e-3, name)
    assert not np.any(of_one["image_head/kernel"]) and np.any(of_one["encoder/stem/kernel"])


def stage(tiny, workdir, name, model, data, **changes):
    section = {**tiny()["data"], "name": data, "tokenizer": "{data_dir}/scenes/statements.txt"}
    recipe = recipes.resolve(tiny(steps=2, objective=name, model=model, data=section, **changes))
    train.run(recipe, str(workdir))
    return recipe, Checkpointer(str(workdir)).read_params(None)[0]


WORDS = {"vocab": 300}


@pytest.mark.long
def test_both_stages_on_scenes(tiny, tmp_path, one_device):
    """Text assignment, then pairs from its parameters, judged; the projection that draws images doesn't train."""
    first, begin = stage(tiny, tmp_path / "a", {"name": "text_assignment", "among": 8}, ASSIGN | WORDS, "scenes/tiny")
    start = jax.device_get(first.train_step().init_from_seed().params)
    assert_close(begin["image_head/kernel"], start["image_head/kernel"], 1e-6)
    assert (begin["text/cross/second/attn/qkv/kernel"] != start["text/cross/second/attn/qkv/kernel"]).any()
    options = TINY | WORDS | dict(images=2, classes=("False", "True"))
    changes = dict(init_from=str(tmp_path / "a"), init_only=("encoder/.*", "text/.*"), evals={"judge": {}})
    recipe, params = stage(tiny, tmp_path / "b", {"name": "judge"}, options, "scenes/pairs_tiny", **changes)
    assert "image_head/kernel" not in params
    found = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["judge/count"] == 16 and found["judge/majority"] == 0.5 and found["judge/blind"] == 0.5
    assert (
        found["judge/consistency"]
        <= found["judge/accuracy"]
        == np.mean([found["judge/accuracy/True"], found["judge/accuracy/False"]])
    )
    assert recipe.objective.flops(recipe.model) > first.objective.flops(first.model) > 0


@pytest.mark.long
def test_one_image_on_scenes(tiny, tmp_path, one_device):
    objective, evals = {"name": "judge", "texts": 3}, {"judge": {}}
    _, params = stage(tiny, tmp_path, objective, TINY | WORDS, "scenes/statements_tiny", evals=evals)
    assert params["head/down/kernel"].shape == (32, 3)
    found = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["judge/count"] == 48 and {"judge/kind/count", "judge/kind/relation"} <= set(found)
    assert "judge/consistency" not in found


PAIRS = TINY | WORDS | dict(images=2, classes=("False", "True"))
BAD = [
    ({"name": "judge"}, PAIRS, "scenes/statements_tiny", "An example has 1 images, and model.images=2"),
    ({"name": "judge"}, TINY | WORDS, "scenes/pairs_tiny", "An example has 2 images, and model.images=1"),
    ({"name": "judge"}, PAIRS | dict(classes=("no", "yes")), "scenes/pairs_tiny", "none of model.classes=.'no', 'yes'"),
    ({"name": "judge"}, PAIRS | dict(classes=("True", "true")), "scenes/pairs_tiny", "two classes or more, each once"),
    ({"name": "judge"}, PAIRS | dict(images=3), "scenes/pairs_tiny", "about 1 image or 2"),
    ({"name": "judge", "texts": 0}, PAIRS, "scenes/pairs_tiny", "texts must be at least 1"),
    ({"name": "judge"}, PAIRS, "scenes/nothing", "no configuration 'nothing'"),
    ({"name": "text_assignment", "among": 2}, ASSIGN, "scenes/tiny", "so it is at least 3"),
    ({"name": "text_assignment", "among": 6}, ASSIGN, "scenes/tiny", "does not divide the 16 examples of a device"),
    ({"name": "text_assignment"}, ASSIGN | dict(projection=0), "scenes/tiny", "needs model.projection of at least 1"),
    ({"name": "text_assignment"}, PAIRS, "scenes/tiny", r"needs model.classes=\('first', 'second', 'neither'\), model"),
]


@pytest.mark.parametrize("objective, model, data, message", BAD)
def test_bad_input(objective, model, data, message, tiny, tmp_path, one_device):
    with pytest.raises(UserError, match=message):
        stage(tiny, tmp_path, objective, model, data)


def test_reading_without_the_end():
    """A model that reads no end gives the same for texts with other ends."""
    text = texts(2)[:, None]
    last = np.asarray(text != 0).sum(axis=-1) - 1
    other = np.asarray(text).copy()
    np.put_along_axis(other, last[..., None], 7, axis=-1)
    image = images(2, 1)
    for reads, same in ((False, True), (True, False)):
        model = model_of(**TINY, reads_end=reads)
        logits = [jax.jit(model.judge)(image, jnp.asarray(t)) for t in (text, other)]
        assert bool(np.allclose(*logits, atol=1e-6)) == same


def test_the_papers_model_has_as_many_parameters_as_the_official_one():
    """NLVR2 on Swin-B at 384: counted on the official class."""
    swin = dict(encoder="swin-B/4", res=384, window=12, eps=1e-5, activation="gelu")
    shapes = Blueprint(JudgeOptions(**swin, images=2, classes=("False", "True"))).shapes
    assert sum(math.prod(shape.shape) for shape in shapes.values()) == 263_123_834


def test_options_are_hashable_and_say_what_they_can():
    options = JudgeOptions(**PAIRS)
    assert dataclasses.replace(options) == options and hash(options)
    assert "class head" in " ".join(options.abilities)
