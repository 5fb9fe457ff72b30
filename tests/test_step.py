"""The train step: sharding, skipping, accumulation, frozen parts, running means."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, tiny_values

from capvl import recipes
from capvl.bench.step import example_batch
from capvl.errors import UserError
from capvl.objectives.cappa import CapPa
from capvl.parallel import compiler, rules
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding
from capvl.step import check_batch


def run(recipe, steps=3, mesh=None, batch=None):
    """(losses, final state) of a few steps on a mesh (one device by default)."""
    mesh = mesh or make_mesh(MeshOptions(), jax.devices()[:1])
    batch = batch or example_batch(recipe, 6)
    with jax.set_mesh(mesh):
        step = recipe.train_step()
        shardings = step.state_shardings(mesh)
        state = step.make_state(mesh)
        update = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        on_device = jax.device_put(batch, batch_sharding(mesh))
        losses = []
        for _ in range(steps):
            state, metrics = update(state, on_device)
            losses.append(float(metrics["loss"]))
        assert update._cache_size() == 1
        return np.array(losses), jax.device_get(state)


@pytest.fixture(scope="module")
def one_device_runs():
    return {}


# Updates in proportion to the gradient: Adafactor's and Adam's own first updates are its sign,
# which noise alone decides where a gradient is zero on paper.
SMOOTH = {"name": "adamw", "lr": 1.0, "eps": 1.0, "momentum_dtype": "float32"}


def assert_params_close(found, expected):
    for name, value in expected.items():
        assert_close(found[name], value, 1e-4, name)


STRATIFIED = pytest.param((2, 2, 2), "stratified", marks=pytest.mark.long)


@pytest.mark.parametrize("shape, draw", [((2, 4, 1), "example"), ((2, 2, 2), "example"), STRATIFIED])
def test_sharded_equals_one_device(tiny_recipe, shape, draw, one_device_runs):
    pa = 0.75 if draw == "example" else 0.5
    recipe = tiny_recipe(optimizer=SMOOTH, objective__draw=draw, objective__pa=pa, objective__chunk=16)
    batch = example_batch(recipe, 6)
    # On one device the stratified share is the batch's head, on several it is each device's head:
    # every device gets the same examples, and the single one all heads before all tails.
    parts = shape[0] * shape[1]
    if draw == "stratified":
        each = 16 // parts
        batch = {k: np.concatenate([v[:each]] * parts) for k, v in batch.items()}
    losses, state = run(recipe, mesh=make_mesh(MeshOptions(*shape)), batch=batch)
    if draw == "stratified":
        heads = {k: np.repeat(v[: each // 2], parts, 0) for k, v in batch.items()}
        tails = {k: np.repeat(v[each // 2 : each], parts, 0) for k, v in batch.items()}
        batch = {k: np.concatenate([heads[k], tails[k]]) for k in batch}
    key = (draw, parts if draw == "stratified" else 0)
    if key not in one_device_runs:
        one_device_runs[key] = run(recipe, batch=batch)
    expected, expected_state = one_device_runs[key]
    assert_close(losses, expected, 1e-5, "losses")
    assert losses[-1] < losses[0]
    assert_params_close(state.params, expected_state.params)


def test_optimizer_state_is_sharded_like_its_parameter(tiny_recipe):
    recipe = tiny_recipe(model__encoder="w64d2h2m128/16", optimizer__ema=0.9)
    step = recipe.train_step()
    mesh = make_mesh(MeshOptions(2, 2, 2))
    state = step.abstract_state(mesh)
    assert any("tensor" in str(leaf.sharding.spec) for leaf in state.params.values())
    checked = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.opt_state, state.ema)):
        name = next((e.key for e in path if isinstance(e, jax.tree_util.DictKey)), None)
        if name is None or leaf.ndim != state.params[name].ndim:
            continue
        wanted = state.params[name].sharding.spec
        for axis, (size, full) in enumerate(zip(leaf.shape, state.params[name].shape, strict=True)):
            given = leaf.sharding.spec[axis] if axis < len(leaf.sharding.spec) else None
            assert given == (wanted[axis] if size == full else None), (path, axis)
            checked += 1
    assert checked > 100


def test_a_fresh_state_is_drawn_where_it_belongs_around_what_is_loaded(tiny_recipe):
    step, mesh = tiny_recipe().train_step(), make_mesh(MeshOptions(2, 2, 2))
    loaded = {"encoder/stem/kernel": jnp.ones(step.blueprint.shapes["encoder/stem/kernel"].shape)}
    state, drawn = step.make_state(mesh, loaded), jax.jit(step.init_from_seed)().params
    for name, value in (drawn | loaded).items():
        assert_close(state.params[name], value, 1e-6, name)
    wanted = step.state_shardings(mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted)))


def test_only_cpus_compile_without_optimisation_what_runs_once():
    assert compiler.options_of_one_call(make_mesh(MeshOptions()))["xla_backend_optimization_level"] == 0
    tpu = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="tpu")]))
    assert compiler.options_of_one_call(tpu) == {}


def test_rules_refuse_two_dimensions_on_one_axis():
    mesh = make_mesh(MeshOptions(1, 4, 2))
    with pytest.raises(ValueError, match="two dimensions on mesh axis"):
        rules.spec(("embed", "embed"), (8, 8), mesh)
    assert rules.spec(("embed", "mlp"), (8, 6), mesh) == jax.P("fsdp", "tensor")
    assert rules.spec(("embed", "mlp"), (6, 5), mesh) == jax.P(None, None)


def states_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


class Cliff(CapPa):
    """CapPa whose loss is finite where its gradient is not, for images that are all black."""

    def loss(self, model, batch, key):
        loss, metrics = super().loss(model, batch, key)
        darkness = jnp.sum(jnp.square(batch["image"] + 1)) * jnp.sum(jnp.square(model.decoder.tokens[...]))
        return loss + jnp.sqrt(darkness) * 1e-9, metrics


@pytest.fixture(scope="module")
def cliff(data_dir):
    """(state, compiled step, batch) of Cliff."""
    values = tiny_values(data_dir)
    changes = {"optimizer": values["optimizer"] | {"ema": 0.9}, "schedule": {"warmup": 0}}
    recipe = recipes.resolve(values | changes)
    step = dataclasses.replace(recipe.train_step(), objective=Cliff())
    batch = jax.device_put(example_batch(recipe, 6))
    batch["image"] = batch["image"].astype(jnp.float32) / 127.5 - 1
    return jax.jit(step.init_from_seed)(), jax.jit(step), batch


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_bad_step_leaves_the_state_untouched(cliff, bad):
    state, update, batch = cliff
    good, metrics = update(state, batch)
    assert metrics["skipped"] == 0
    assert not states_equal(good.params, state.params)
    image = batch["image"].at[0, 0, 0, 0].set(jnp.nan) if bad == "loss" else jnp.full_like(batch["image"], -1)
    after, metrics = update(good, batch | {"image": image})
    assert np.isfinite(metrics["loss"]) == (bad == "gradient")
    assert not np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == metrics["skipped_in_row"] == 1
    for field in ("params", "opt_state", "ema", "norm_mean"):
        assert states_equal(getattr(after, field), getattr(good, field)), field
    assert after.step == good.step + 1
    recovered, metrics = update(after, batch)
    assert metrics["skipped"] == 1
    assert metrics["skipped_in_row"] == 0
    assert not states_equal(recovered.params, after.params)


def test_spike_is_skipped(tiny_recipe):
    recipe = tiny_recipe(spike=3.0, steps=200)
    step = recipe.train_step()
    state = jax.jit(step.init_from_seed)()._replace(step=jnp.int32(60), norm_mean=jnp.float32(1e-4))
    batch = jax.device_put(example_batch(recipe, 6))
    after, metrics = jax.jit(step)(state, batch)
    assert metrics["skipped"] == 1
    assert states_equal(after.params, state.params)
    calm = state._replace(norm_mean=jnp.float32(1e3))
    assert jax.jit(step)(calm, batch)[1]["skipped"] == 0
    early = state._replace(step=jnp.int32(10))
    assert jax.jit(step)(early, batch)[1]["skipped"] == 0


@pytest.mark.parametrize("average", ["example", "token"])
def test_micro_batches_equal_one_batch(tiny_recipe, average):
    changes = dict(optimizer=SMOOTH, objective__pa=0.0, objective__average=average)
    losses, state = run(tiny_recipe(**changes))
    micro_losses, micro_state = run(tiny_recipe(micro_batches=4, **changes))
    assert_close(micro_losses, losses, 1e-5)
    assert_params_close(micro_state.params, state.params)


def test_micro_batches_stay_on_their_device(tiny_recipe):
    changes = dict(objective__pa=0.0)
    mesh = make_mesh(MeshOptions(2, 2, 1), jax.devices()[:4])
    losses, _ = run(tiny_recipe(micro_batches=2, **changes), mesh=mesh)
    assert_close(losses, run(tiny_recipe(**changes))[0], 1e-5)


def test_frozen_parts_have_no_state_and_do_not_move(tiny_recipe):
    recipe = tiny_recipe(optimizer__frozen=("encoder/.*",), schedule__warmup=0)
    step = recipe.train_step()
    before = jax.jit(step.init_from_seed)()
    after, metrics = jax.jit(step)(before, jax.device_put(example_batch(recipe, 6)))
    for name in before.params:
        moved = not np.array_equal(before.params[name], after.params[name])
        assert not (moved and name.startswith("encoder/")), name
    assert not np.array_equal(before.params["decoder/logits/kernel"], after.params["decoder/logits/kernel"])
    names = {e.key for p, _ in jax.tree_util.tree_leaves_with_path(before.opt_state) for e in p if hasattr(e, "key")}
    assert names
    assert not any(n.startswith("encoder/") for n in names)


def test_frozen_pattern_that_matches_nothing(tiny_recipe):
    with pytest.raises(UserError, match="matches no parameter"):
        tiny_recipe(optimizer__frozen=("encodr/.*",)).train_step()
    with pytest.raises(UserError, match="no parameter to train"):
        tiny_recipe(optimizer__frozen=(".*",)).train_step()


def test_running_mean_of_parameters(tiny_recipe):
    recipe = tiny_recipe(optimizer__ema=0.5, schedule__warmup=0)
    step = recipe.train_step()
    state = jax.jit(step.init_from_seed)()
    expected = {k: np.asarray(v, np.float64) for k, v in state.params.items()}
    batch = jax.device_put(example_batch(recipe, 6))
    update = jax.jit(step)
    for _ in range(3):
        state, _ = update(state, batch)
        expected = {k: 0.5 * v + 0.5 * np.asarray(state.params[k]) for k, v in expected.items()}
    for name, value in expected.items():
        assert_close(state.ema[name], value, 1e-5, name)


def test_batch_and_mesh_that_do_not_fit():
    mesh = make_mesh(MeshOptions(2, 4, 1))
    assert check_batch(32, 2, mesh) == 2
    with pytest.raises(UserError, match="batch_size=30.*nearest that does is 32"):
        check_batch(30, 1, mesh)
    for options, words in (
        (MeshOptions(3, -1, 1), "multiple of 3 devices, but there are 8"),
        (MeshOptions(2, 2, 1), "makes 4 devices, but there are 8"),
        (MeshOptions(-1, -1, 1), "at most one of them -1"),
        (MeshOptions(0, 8, 1), "must be positive"),
    ):
        with pytest.raises(UserError, match=words):
            make_mesh(options)
