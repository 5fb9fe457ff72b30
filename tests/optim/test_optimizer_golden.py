"""Every optimizer variant of golden/cappa/opt.npz, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden, under

from capvl.optim.optimizer import OptimizerOptions, apply, make_optimizer, split_trainable
from capvl.optim.schedules import ScheduleOptions, make_schedule

pytestmark = pytest.mark.golden

VARIANTS = {
    "default": ({}, {}),
    "f32mom": ({"momentum_dtype": "float32"}, {}),
    "nomom": ({"beta1": 0.0}, {}),
    "frozen": ({"frozen": ("attn/.*",)}, {}),
    "lrmult": ({"lr_mult": (("embed/.*", 0.1),), "decay": ((".*/bias", 2.0), (".*/kernel", 1.0))}, {}),
    "rsqrt": ({}, {"kind": "rsqrt", "timescale": 5, "cooldown": 4}),
    "clipthr": ({"clip_rms": 1.0, "beta2": 0.95}, {}),
    "linear": ({}, {"kind": "linear", "end": 0.1}),
    "adamw": ({"name": "adamw", "beta2": 0.95}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant):
    golden = load_golden("cappa", "opt.npz")
    cfg = {k: v.item() for k, v in under(golden, "cfg").items()}
    optimizer_changes, schedule_changes = VARIANTS[variant]
    options = OptimizerOptions(lr=cfg["lr"], weight_decay=cfg["wd"], clip_norm=cfg["clip"], **optimizer_changes)
    total = cfg["total_steps"]
    schedule = make_schedule(ScheduleOptions(**({"warmup": cfg["warmup_steps"]} | schedule_changes)), total)
    expected_schedule = golden[f"{variant}/schedule"][0]
    assert_close([schedule(i) for i in range(len(expected_schedule))], expected_schedule, 1e-5, "schedule")

    params = jax.device_put(under(golden, "params0"))
    params, frozen = split_trainable(params, options)
    optimizer = make_optimizer(options)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads, i):
        updates, state = optimizer.update(grads, state, params)
        return apply(params, updates, schedule(i)), state

    for i in range(cfg["steps"]):
        grads = {k: jnp.asarray(v) for k, v in under(golden, f"grad{i}").items() if k in params}
        params, state = step(params, state, grads, i)
        for path, expected in under(golden, f"{variant}/params{i + 1}").items():
            assert_close((params | frozen)[path], expected, 5e-6, f"step {i + 1} {path}")


def test_which_leaves_are_factored():
    golden = load_golden("cappa", "opt.npz")
    params = jax.device_put(under(golden, "params0"))
    state = make_optimizer(OptimizerOptions()).init(params)[1]
    rows = under(golden, "default/state/1/0/0/1")
    for path in params:
        placeholder = rows[path].shape == (1,) != params[path].shape
        assert (state.row[path].shape == (1,)) == placeholder, path
        if not placeholder:
            assert np.squeeze(state.row[path]).shape == rows[path].shape
