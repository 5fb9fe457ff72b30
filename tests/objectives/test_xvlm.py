"""X-VLM's objective: what a step takes, the same on any number of devices, and what it is without regions."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from capvl import recipes, train
from capvl.checkpoint import Checkpointer
from capvl.errors import UserError
from capvl.models.parameters import Blueprint
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding

MODEL = {
    "encoder": "w16d2h2m32/8",
    "res": 32,
    "text": "w16d2h2m32",
    "cross_layers": 1,
    "vocab": 256,
    "length": 12,
    "text_positions": 12,
    "dropout": 0.0,
    "projection": 8,
    "dtype": "float32",
}
OBJECTIVE = {"name": "xvlm", "share": 0.5, "group": (1, 2), "slots": 3, "masks": 3}


@pytest.fixture
def recipe(tiny):
    def make(model=(), objective=(), **changes):
        given = {"model": MODEL | dict(model), "objective": OBJECTIVE | dict(objective)}
        data = {"data__name": "pairs=scenes/tiny + regions=scenes/tiny", "data__flip": True}
        data |= {"data__tokenizer": "{data_dir}/scenes/wordpiece.txt"}
        return recipes.resolve(tiny(**given | data | changes))

    return make


def batch_of(recipe):
    """Its first batch."""
    return next(recipe.train_loader(recipe.transforms()))


def step_on(recipe, batch, mesh):
    """(metrics, parameters) after one step on a mesh."""
    step = recipe.train_step()
    with jax.set_mesh(mesh):
        state = step.make_state(mesh)
        state, metrics = step.jit(mesh)(state, jax.device_put(batch, batch_sharding(mesh)))
    return jax.device_get((metrics, state.params))


MESHES = {"fsdp": ({"fsdp": 8}, {"same_image": True}), "all": ({"replica": 2, "fsdp": 2, "tensor": 2}, {"among": 4})}


@pytest.mark.long
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_are_one(recipe, mesh):
    """The negatives, too: with others the loss of matching would differ."""
    axes, options = MESHES[mesh]
    r = recipe(objective=options)
    batch = batch_of(r)
    metrics, params = step_on(r, batch, make_mesh(MeshOptions(), jax.devices()[:1]))
    found, others = step_on(r, batch, make_mesh(MeshOptions(**axes)))
    for name, value in metrics.items():
        assert_close(found[name], value, 2e-5, name)
    for name, value in params.items():
        assert_close(others[name], value, 2e-4, name)


def test_texts_of_a_group_are_taken_by_their_number_in_their_image(recipe):
    r = recipe(objective={"group": (2, 3)})
    count, slots = 4, 3
    spec = r.objective.batch_spec(r.model, 2 * count)["regions"]
    rows = {k: np.zeros(s.shape, s.dtype) for k, s in spec.items()}
    rows["slots"] = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)
    rows["text"][..., 0] = 1 + np.arange(count * slots).reshape(count, slots)
    rows["id"] = np.arange(10, 10 + count, dtype=np.int32)
    ready = r.objective.prepare({"regions": rows}, train=True)["regions"]
    np.testing.assert_array_equal(ready["text"][:, 0], [1, 4, 2, 10, 11, 7])
    np.testing.assert_array_equal(ready["there"], [1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(ready["owner"], [[0, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(ready["id"], [10, 11, 10, 13, 13, 12])
    assert float(ready["left"]) == 1.0


@functools.cache
def fresh(options):
    """Parameters of a new model."""
    return jax.jit(Blueprint(options).init)(jax.random.key(3))


def losses(r, batch, gradients=True):
    """(loss, metrics) of a batch at fresh parameters, and gradients."""
    step = r.train_step()

    def loss(params, batch):
        ready = r.objective.prepare(batch, train=True)
        return r.objective.loss(step.blueprint.bind(params), ready, jax.random.key(0))

    run = jax.value_and_grad(loss, has_aux=True) if gradients else loss
    return jax.jit(run)(fresh(r.model), batch)


@pytest.mark.long
def test_empty_slots_change_nothing(recipe):
    """Whatever stands in a slot that isn't taken."""
    r = recipe(objective={"itm": 1.0, "group": (1, 3)})
    batch = batch_of(r)
    other = jax.tree.map(np.copy, batch)
    empty = ~other["regions"]["slots"]
    assert empty.any()
    other["regions"]["text"][empty] = 7
    other["regions"]["box"][empty] = [0.2, 0.1, 0.9, 0.3]
    other["regions"]["words"][empty] = 5
    (a, _), gradients = losses(r, batch)
    (b, _), others = losses(r, other)
    assert_close(b, a, 1e-6)
    for name, value in gradients.items():
        assert_close(others[name], value, 1e-5, name)


def test_without_any_region_the_losses_of_regions_are_zero(recipe):
    r = recipe()
    batch = batch_of(r)
    batch["regions"]["slots"][:] = False
    (loss, metrics), gradients = losses(r, batch)
    for name in ("itc", "itm", "mlm", "l1", "giou"):
        assert float(metrics[f"regions_{name}"]) == 0.0, name
    assert_close(loss, sum(metrics[f"pairs_{name}"] for name in ("itc", "itm", "mlm")), 1e-6)
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(gradients))


def test_a_box_without_area_gives_no_nan(recipe):
    r = recipe(objective={"kinds": ("regions",)}, data__name="scenes/tiny")
    batch = batch_of(r)
    batch["regions"]["box"][:] = [0.5, 0.5, 0.5, 0.5]
    _, gradients = losses(r, batch)
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(gradients))


@pytest.mark.long
def test_two_updates_are_those_of_two_steps(recipe):
    """Regions first, then pairs, with nothing drawn at random."""
    plain = {"itm": 0.0}
    model = {"heads": ("itc", "mlm", "box")}
    r = recipe(model, plain | {"separate": True}, schedule={"warmup": 0, "kind": "constant"})
    batch = batch_of(r)
    mesh = make_mesh(MeshOptions(), jax.devices()[:1])
    metrics, params = step_on(r, batch, mesh)
    step = recipe(model, plain, schedule={"warmup": 0, "kind": "constant"}).train_step()
    state = step.make_state(mesh)
    for kind in ("regions", "pairs"):
        alone = dataclasses.replace(step, objective=_OneKind(r.objective, kind))
        state, found = jax.jit(alone)(state, batch)
        assert_close(metrics[f"{kind}_itc"], found[f"{kind}_itc"], 1e-5)
    assert metrics["step" if "step" in metrics else "skipped"] == 0
    for name, value in state.params.items():
        assert_close(params[name], value, 1e-5, name)


@dataclasses.dataclass(frozen=True)
class _OneKind:
    """An objective that looks at one kind of its batches."""

    whole: object
    kind: str

    def prepare(self, batch, *, train):
        return self.whole.prepare({self.kind: batch[self.kind]}, train=train)

    def loss(self, model, batch, key):
        return self.whole.loss(model, batch, key)

    def frozen(self, model_options):
        return ()


@pytest.mark.long
@pytest.mark.parametrize("separate", [False, True])
def test_resumed_is_uninterrupted(recipe, tmp_path, one_device, separate):
    whole, part = tmp_path / "whole", tmp_path / "part"
    r = recipe({"dropout": 0.1}, {"separate": separate}, steps=4)
    train.run(r, str(whole))
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints/4")
    train.run(r, str(part))
    (a, step), (b, other) = (Checkpointer(str(workdir)).read_all() for workdir in (whole, part))
    assert step == other == 4
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "model, objective, said",
    [
        ({}, {"group": (3, 8)}, "16 pairs on a device are 8 images with regions, which don't fall into groups"),
        ({"heads": ("itc", "itm", "mlm")}, {}, "has a loss 'box', and model.heads=.* lacks it"),
        ({}, {"mlm": 0.0}, "model.heads has 'mlm', which no loss of the objective trains"),
        ({}, {"kinds": ("pairs", "boxes")}, "objective.kinds: 'boxes' is unknown"),
        ({}, {"itc": 0.0}, "objective.itm draws hard negatives by the similarities that objective.itc trains"),
        ({}, {"kinds": ("pairs",), "separate": True}, "objective.separate=True needs both kinds of batch"),
        ({"length": 2}, {}, "model.length=2 should be at least 3"),
        ({"cross_layers": 2}, {}, "model.cross_layers=2 should be at least 1 and less than the 2 layers"),
        ({"local_layers": 1}, {}, "needs a ViT with model.pool='cls'"),
        ({"patch_dropout": 0.5}, {}, "model.patch_dropout would drop patches that regions are made of"),
        ({"encoder": "swin-w8d2-2h1-2/4", "window": 3}, {}, "can't be divided into windows"),
    ],
)
def test_contradictions_are_told(recipe, tmp_path, one_device, model, objective, said):
    with pytest.raises(UserError, match=said):
        train.run(recipe(model, objective), str(tmp_path / "run"))


def test_regions_alone_are_all_of_the_batch(recipe):
    """`share` says nothing there; and of both kinds regions have the first update, in whatever order they are named."""
    r = recipe(objective={"kinds": ("regions",), "group": (1, 2), "share": 0.3})
    r.objective.check(r.model, 9, 1)
    other = recipe(objective={"kinds": ("regions",), "group": (5, 8)})
    with pytest.raises(UserError, match="A device has 16 images with regions, which don't fall into groups of 5"):
        other.objective.check(other.model, 16, 1)
    r = recipe(objective={"kinds": ("regions", "pairs"), "separate": True})
    assert r.objective.updates() == (("regions",), ("pairs",))


def test_a_map_head_that_nothing_reads_does_not_train(recipe):
    r = recipe({"pool": "map"})
    assert not any(name.startswith("encoder/map/") for name in r.train_step().trainable)
    r = recipe({"pool": "mean"})
    assert "encoder/norm/scale" in r.train_step().trainable


def test_a_phrase_that_is_too_long_is_cut_and_counted(recipe):
    r = recipe({"length": 4, "text_positions": 4}, {"masks": 2})
    batch = batch_of(r)
    pairs = batch["pairs"]
    assert pairs["cut"].all() and (pairs["text"][:, -1] != 0).all()
    _, metrics = losses(r, batch, gradients=False)
    assert float(metrics["pairs_cut"]) == 1.0


def test_masked_words_are_where_they_are_said_to_be(recipe):
    batch = batch_of(recipe())["pairs"]
    for text, masked, places, words in zip(*(batch[k] for k in ("text", "masked", "places", "words")), strict=True):
        used = words >= 0
        assert used.any()
        np.testing.assert_array_equal(text[places[used]], words[used])
        assert set(np.flatnonzero(text != masked)) <= set(places[used].tolist())


def test_blind_training_sees_nothing(recipe):
    r = recipe(objective={"blind": True})
    ready = r.objective.prepare(batch_of(r), train=True)
    assert not np.asarray(ready["pairs"]["image"]).any() and not np.asarray(ready["regions"]["image"]).any()


def test_flops_are_those_of_the_compiled_step(recipe):
    """XLA counts the forward pass without the similarities, softmax and norms within a few per cent."""
    r = recipe({"unroll": True, "length": 12}, {"itm": 1.0})
    step = r.train_step()
    spec = r.objective.batch_spec(r.model, r.batch_size)

    def forward(params, batch):
        ready = r.objective.prepare(batch, train=True)
        return r.objective.loss(step.blueprint.bind(params), ready, jax.random.key(0))[0]

    counted = jax.jit(forward).lower(step.blueprint.shapes, spec).compile().cost_analysis()["flops"]
    ours = r.objective.flops(r.model) / 3 * r.batch_size
    assert 0.5 < ours / counted < 1.1, (ours, counted)
    assert jnp.isfinite(ours)
