"""GLIP's objective: what a step takes, what learns, the same on any number of devices, and whole runs."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import assert_close, tiny_values

from capvl import recipes, train
from capvl.checkpoint import Checkpointer
from capvl.data.images.buckets import buckets_in
from capvl.data.scenes import making, world
from capvl.errors import UserError
from capvl.models.parameters import Blueprint
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding

MODEL = {
    "encoder": "w16d1h2m32/8",
    "pad_windows": False,
    "level_norms": False,
    "pixels": "half",
    "res": 64,
    "max_side": 64,
    "width": 16,
    "blocks": 1,
    "groups": 2,
    "offsets": "none",
    "fusion_width": 16,
    "fusion_heads": 2,
    "text": "w16d1h2m32",
    "vocab": 256,
    "length": 32,
    "text_positions": 32,
    "dropout": 0.1,
    "dtype": "float32",
}
SWIN = {"encoder": "swin-w8d1-1-1h2-2-2/8", "pad_windows": True, "level_norms": True, "window": 4}
OBJECTIVE = {"name": "glip", "texts": ("classes", "phrases"), "negatives": 4, "slots": 3, "nearest": 3}
CLOSED = {"texts": ("classes",), "order": "fixed"}
SIZES = ((64, 64), (64, 32))
BATCH = 8
OPTIMIZED = {"xla_backend_optimization_level": 1}
"""As in tests/models/test_tower.py: without it XLA's gradients of loops over blocks with dropout differ."""


@pytest.fixture(scope="module")
def make(data_dir):
    """A function that gives a recipe."""
    making.scenes("pairs_apart_tiny", data_dir)
    making.scenes_tokenizer(data_dir, "wordpiece")

    def made(model=(), objective=(), **changes):
        values = tiny_values(data_dir) | {"model": MODEL | dict(model), "objective": OBJECTIVE | dict(objective)}
        values |= {"batch_size": BATCH, "steps": 4} | changes
        values["data"] = {"name": "scenes/pairs_apart_tiny", "data_dir": data_dir, "flip": True}
        values["data"] |= {"tokenizer": "{data_dir}/scenes/wordpiece.txt"}
        return recipes.resolve(values)

    return made


def batch_of(recipe):
    """Its first batch, whose last image has no box."""
    batch = dict(next(recipe.train_loader(recipe.transforms())))
    for name in ("slots", "positive", "box"):
        batch[name] = batch[name].copy()
        batch[name][-1] = 0
    return batch


@pytest.fixture(scope="module")
def batch(make):
    return batch_of(make())


def random_params(options):
    """Far from fresh ones, of which many are 0; with units before ReLUs that are not all below 0."""
    rng, found = np.random.default_rng(1), {}
    for name, shape in Blueprint(options).shapes.items():
        value = 0.2 * rng.normal(size=shape.shape) + name.endswith(("/scale/bias", "task/down/bias", "norm/scale"))
        found[name] = value.astype(np.float32)
    return jax.device_put(found)


@functools.cache
def compiled(objective, options, grad=True, optimized=False):
    """(params, batch, key) -> ((loss, metrics), gradients) of a raw batch."""

    def loss(params, batch, key):
        return objective.loss(Blueprint(options).bind(params), objective.prepare(batch, train=True), key)

    def run(params, batch, key):
        return jax.value_and_grad(loss, has_aux=True)(params, batch, key) if grad else loss(params, batch, key)

    return jax.jit(run, compiler_options=OPTIMIZED if optimized else None)


def losses(recipe, batch, params=None, optimized=False):
    params = random_params(recipe.model) if params is None else params
    run = compiled(recipe.objective, recipe.model, optimized=optimized)
    return jax.device_get(run(params, batch, jax.random.key(0)))


@pytest.fixture(scope="module")
def whole(make, batch):
    """((loss, metrics), gradients) of the plain recipe."""
    return losses(make(), batch)


def test_a_batch_is_what_is_said_of_it(make):
    r = make(objective={"sizes": SIZES})
    loader, found = r.train_loader(r.transforms()), []
    for _ in range(3):
        rows = next(loader)
        (bucket,) = buckets_in(rows)
        spec = r.batch_spec(bucket=bucket)
        assert {k: (x.shape, x.dtype) for k, x in rows.items()} == {k: (s.shape, s.dtype) for k, s in spec.items()}
        assert rows["slots"].any() and (rows["positive"].any(axis=2) == rows["slots"]).all()
        assert not (rows["positive"] & (rows["text"] == 0)[:, None]).any()
        found.append(tuple(bucket))
    assert found == [(64, 64), (64, 32), (64, 64)]
    whole = make()
    assert {k: s.shape for k, s in whole.batch_spec().items()} == {k: s.shape for k, s in spec.items()}
    assert r.objective.flops(r.model) < whole.objective.flops(whole.model) / 1.2


def test_the_loss_is_its_parts(whole, make, batch):
    (loss, metrics), _ = whole
    assert_close(loss, metrics["token"] + 2 * metrics["box"] + metrics["centerness"], 1e-6)
    assert metrics["places"] > 1 and min(metrics[k] for k in ("token", "box", "centerness")) > 0.01
    assert_close(metrics["left"], batch["left"].mean(), 1e-6)
    r = make(objective={"token": 0.5, "box": 0.0, "centerness": 3.0})
    other, found = jax.device_get(
        compiled(r.objective, r.model, False)(random_params(r.model), batch, jax.random.key(0))
    )
    assert_close(other, 0.5 * metrics["token"] + 3 * metrics["centerness"], 1e-5)
    assert_close(found["box"], metrics["box"], 1e-5)


KINDS = {
    "both": ({}, {}),
    "both, with offsets": ({"offsets": "flat"}, {}),
    "separate, clean": ({"fusion": "separate", "offsets": "clean"}, {}),
    "to_image, Swin": (SWIN | {"fusion": "to_image"}, {}),
    "none, prompt tuned, contrast": (
        {"fusion": "none", "prompt_table": True, "contrast": 8}, {"contrastive": 1.0}),
    "closed list": ({"fusion": "none", "classes": world.PAIRS, "length": 64, "text_positions": 64}, CLOSED),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.long) if "," in kind else kind for kind in KINDS]
)
def test_every_parameter_learns(make, kind):
    """But for those that the objective says nothing reaches."""
    r = make(*KINDS[kind])
    (loss, metrics), gradients = losses(r, batch_of(r))
    assert np.isfinite(loss) and all(np.isfinite(x).all() for x in gradients.values())
    still = {name for name, x in gradients.items() if not np.abs(x).max() > 0}
    assert still <= set(Blueprint(r.model).shapes) - r.train_step().trainable
    if r.model.prompt_table:
        rows = np.abs(gradients["prompt"]).max(axis=1) > 0
        assert rows[:4].all() and not rows[r.model.length :].any()
    if r.model.classes:
        assert (np.abs(gradients["classes"]).max(axis=1) > 0).all() and not any(
            k.startswith("text/") for k in gradients
        )


def test_images_without_any_box(make, batch, whole):
    """All tokens are wrong; of boxes nothing is learned, and nothing is NaN."""
    empty = batch | {"slots": np.zeros_like(batch["slots"]), "positive": np.zeros_like(batch["positive"])}
    (loss, metrics), gradients = losses(make(), empty)
    assert metrics["box"] == metrics["centerness"] == metrics["places"] == 0
    assert np.isfinite(loss) and loss > 0 and all(np.isfinite(x).all() for x in gradients.values())
    assert not gradients["head/box/kernel"].any() and np.abs(gradients["encoder/positions"]).max() > 0
    # Whatever stands in slots that aren't taken.
    other = batch | {name: batch[name].copy() for name in ("box", "positive")}
    other["box"][~batch["slots"]] = [0.1, 0.2, 0.6, 0.7]
    other["positive"][~batch["slots"]] = True
    assert (~batch["slots"]).any()
    (found, _), others = losses(make(), other)
    assert_close(found, whole[0][0], 1e-6)
    for name, value in whole[1].items():
        assert_close(others[name], value, 1e-5, name)


@pytest.mark.long
def test_recomputed_is_kept(make, batch):
    """With dropout, whose masks must be the same when they are drawn again."""
    (expected, _), kept = losses(make(), batch, optimized=True)
    (loss, _), gradients = losses(make({"remat": "full"}), batch, optimized=True)
    assert_close(loss, expected, 1e-6)
    for name, value in kept.items():
        assert_close(gradients[name], value, 2e-5, name)


def test_parts_of_a_batch_are_the_whole(make, batch):
    """Their boxes are so unlike in number that a part's own divisors would show."""
    r = make({"dropout": 0.0})
    params, model = random_params(r.model), Blueprint(r.model)
    few = batch | {"slots": batch["slots"] & (np.arange(BATCH) % 3 > 0)[:, None]}
    ready = jax.device_get(jax.jit(lambda rows: r.objective.prepare(rows, train=True))(few))

    @jax.jit
    def loss(params, ready):
        return r.objective.loss(model.bind(params), ready, jax.random.key(0))[1]

    expected = loss(params, ready)
    parts = [loss(params, jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], ready)) for i in range(BATCH // 2)]
    for name in ("loss", "token", "box", "centerness", "places"):
        # The divisor is a sum over rows, so a part of a quarter is divided by a quarter.
        assert_close(np.mean([part[name] for part in parts]), expected[name], 1e-5, name)


@pytest.mark.long
def test_eight_devices_are_one(make, batch):
    whole = losses(make(), batch, optimized=True)
    r, mesh = make(), make_mesh(MeshOptions(replica=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        shardings = Blueprint(r.model).shardings(mesh)
        params = {name: jax.device_put(x, shardings[name]) for name, x in random_params(r.model).items()}
        spread = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), batch)
        (loss, metrics), gradients = losses(r, spread, params, optimized=True)
    assert_close(loss, whole[0][0], 2e-5)
    for name, value in whole[0][1].items():
        assert_close(metrics[name], value, 2e-5, name)
    for name, value in whole[1].items():
        assert_close(gradients[name], value, 2e-4, name)


def test_blind(make, batch):
    """Nothing of an image is left but where it is."""

    def image(batch, blind):
        objective = make(objective={"blind": blind}).objective
        return np.asarray(jax.jit(lambda rows: objective.prepare(rows, train=True)["image"])(batch))

    seen, blind = (image(batch, how) for how in (False, True))
    assert not blind[..., :3].any() and np.abs(seen[..., :3]).max() > 0.5
    np.testing.assert_array_equal(blind[..., 3], seen[..., 3])


EVALS = {"detection": {"limit": 4, "most": 20}}


@pytest.mark.long
def test_resumed_is_uninterrupted_in_two_sizes(make, tmp_path, one_device):
    """A run that is killed between two checkpoints; each of both sizes is compiled once."""
    options = dict(objective={"sizes": SIZES}, checkpoint={"every": 2}, evals=EVALS)
    loop, log, counts = train.loop, train.Run.log, []

    def counting(training, state, stop):
        out = loop(training, state, stop)
        counts.append(training.update._cache_size())
        return out

    def killed(self, step, values):
        if step == 3:
            raise KeyboardInterrupt
        log(self, step, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "loop", counting)
        train.run(make(**options), str(tmp_path / "whole"))
    assert counts == [2]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "log", killed)
        train.run(make(**options), str(tmp_path / "cut"))
    assert Checkpointer(str(tmp_path / "cut")).steps() == [2]
    train.run(make(**options), str(tmp_path / "cut"))
    (a, step), (b, other) = (Checkpointer(str(tmp_path / name)).read_all() for name in ("whole", "cut"))
    assert step == other == 4
    jax.tree.map(np.testing.assert_array_equal, a, b)
    told = [values_of(tmp_path / name) for name in ("whole", "cut")]
    assert told[0]["detection/images"] == 4 and 0 <= told[0]["detection/AP"] <= 1
    for name in ("detection/AP", "detection/objects", "detection/agnostic/AR100"):
        assert told[0][name] == told[1][name]


def values_of(workdir) -> dict:
    """What a run logged last, by name."""
    lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


BAD_OBJECTIVES = [
    (dict(token=0.0), "token must be above 0, and box, centerness and contrastive not negative"),
    (dict(box=-1.0), "token must be above 0, and box, centerness and contrastive not negative"),
    (dict(slots=0), "slots and nearest must be at least 1, gamma not negative, and alpha at most 1"),
    (dict(nearest=0), "slots and nearest must be at least 1"),
    (dict(gamma=-1.0), "gamma not negative"),
    (dict(alpha=1.5), "alpha at most 1"),
    (dict(sizes=((64, 65),)), r"objective.sizes: \(64, 65\) should be a height and a width in pixels, multiples of 32"),
    (dict(sizes=((0, 64),)), "multiples of 32"),
    (dict(sizes=((64,),)), "should be a height and a width|should read|sizes"),
]


@pytest.mark.parametrize("options, said", BAD_OBJECTIVES)
def test_objectives_that_can_not_be(make, options, said):
    with pytest.raises(UserError, match=said) as error:
        make(objective=options)
    assert "\n" not in str(error.value)


CONTRADICTIONS = [
    (KINDS["closed list"][0], {}, r"a closed list, goes with objective.texts=\('classes',\) and order='fixed'"),
    ({}, {"contrastive": 1.0}, "objective.contrastive, a weight, goes with model.contrast, a width"),
    ({"contrast": 8}, {}, "set both or neither"),
    ({}, {"sizes": ((64, 96),)}, r"objective.sizes has \(64, 96\), and model.max_side=64 lets no image be so long"),
]


@pytest.mark.parametrize("model, objective, said", CONTRADICTIONS)
def test_a_model_and_an_objective_that_contradict(make, model, objective, said):
    r = make(model, objective)
    with pytest.raises(UserError, match=said):
        r.check(make_mesh(MeshOptions(), jax.devices()[:1]))


def test_data_that_an_objective_can_not_take(make, data_dir):
    with pytest.raises(UserError, match="closed list of 12 classes, and 'green diamond' is none of them"):
        make({"fusion": "none", "classes": (*world.PAIRS[:11], "cat"), "length": 12}, CLOSED).transforms()
    packed = make(objective={"texts": ("captions",), "packed": 2})
    assert packed.transforms()[""].transform.captions is not None
    evaluated = packed.objective.transform(packed.model, packed.data, train=False)
    assert evaluated.captions is None and not evaluated.train


def test_a_fixed_order_needs_a_closed_list(tiny_recipe, data_dir):
    making.scenes_tokenizer(data_dir, "wordpiece")
    tokenizer = "{data_dir}/scenes/wordpiece.txt"
    r = tiny_recipe(model=MODEL, objective=OBJECTIVE | {"order": "fixed"}, data__tokenizer=tokenizer)
    with pytest.raises(UserError, match="order='fixed' needs data with a closed list of classes, and 'scenes/"):
        r.transforms()


BAD_MODELS = [
    (dict(max_side=32), "model.max_side=32 should be at least model.res=64"),
    (dict(res=16), "model.res=16 should be at least 32 pixels, a place of the level P5"),
    (dict(width=18), "model.width=18 a multiple of 4 and of model.groups=2"),
    (dict(groups=3), "a multiple of 4 and of model.groups=3"),
    (dict(blocks=0), "model.blocks=0 must be at least 1"),
    (dict(fusion_heads=3), "model.fusion_width=16 should be a multiple of model.fusion_heads=3"),
    (dict(fusion="bth"), "fusion.*'bth'.*Did you mean 'both'"),
    (dict(offsets="flet"), "offsets.*'flet'.*Did you mean 'flat'"),
    (dict(contrast=-1), "model.contrast must not be negative, not -1"),
    (dict(classes=("a", "b")), "a closed list of 2, goes with model.length=2 and model.fusion='none'"),
    (dict(classes=("a", "a"), length=2, fusion="none"), "should have the name of each class once"),
    (dict(length=2), "model.length=2 should be at least 3 and fit model.text_positions=32"),
    (dict(length=40), "model.length=40 should be at least 3 and fit model.text_positions=32"),
    (dict(length=1001, text_positions=1001, prompt_table=True), "has 1000 rows, fewer than model.length=1001"),
    (dict(dropout=1.0), r"model.dropout and model.drop_block must be in \[0, 1\)"),
    (dict(patch_dropout=0.5), "model.patch_dropout would leave holes in the pyramid; it must be 0 here"),
]


@pytest.mark.parametrize("options, said", BAD_MODELS)
def test_models_that_can_not_be(make, options, said):
    with pytest.raises(UserError, match=said) as error:
        make(options)
    assert "\n" not in str(error.value)
