"""golden/xvlm/xvlm_util.npz: Hugging Face's AdamW with four groups of parameters, and X-VLM's schedule."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden

from capvl.optim.optimizer import OptimizerOptions, apply, make_optimizer
from capvl.optim.schedules import ScheduleOptions, make_schedule

pytestmark = pytest.mark.golden


def numbered(golden, prefix):
    """[values of prefix0, of prefix1, ...], each a dict by parameter."""
    found = []
    while any(name.startswith(f"{prefix}{len(found)}.") for name in golden):
        start = f"{prefix}{len(found)}."
        found.append({k.removeprefix(start): jnp.asarray(v) for k, v in golden.items() if k.startswith(start)})
    return found


def test_steps():
    golden = load_golden("xvlm", "xvlm_util.npz")
    params, grads = numbered(golden, "opt.p"), numbered(golden, "opt.grad")
    assert len(params) == len(grads) + 1 > 1
    rates, decays = np.float64(golden["opt.group_lr"]), np.float64(golden["opt.group_wd"])
    lr, decay = rates.min(), decays.max()
    names = [[str(name) for name in golden[f"opt.group{i}_names"]] for i in range(len(rates))]
    beta1, beta2, eps = (float(v) for v in golden["opt.betas_eps"])
    options = OptimizerOptions(
        name="adamw_hf",
        lr=lr,
        weight_decay=decay,
        clip_norm=1.0,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        momentum_dtype="float32",
        lr_mult=tuple((re.escape(n), r / lr) for group, r in zip(names, rates, strict=True) for n in group),
        decay=tuple((re.escape(n), d / decay) for group, d in zip(names, decays, strict=True) for n in group),
    )
    optimizer = make_optimizer(options)

    @jax.jit
    def step(params, state, grads, multiplier):
        updates, state = optimizer.update(grads, state, params, multiplier=multiplier)
        return apply(params, updates, multiplier), state

    ours, state = params[0], optimizer.init(params[0])
    for i, gradient in enumerate(grads):
        rates_now = np.float64(golden[f"opt.lr{i}"])
        np.testing.assert_allclose(rates_now / rates, rates_now[0] / rates[0], rtol=1e-6)  # One schedule for all.
        ours, state = step(ours, state, gradient, jnp.float32(rates_now[0] / rates[0]))
        assert ours.keys() == params[i + 1].keys()
        for name, expected in params[i + 1].items():
            assert_close(ours[name], expected, 1e-6, f"step {i + 1} {name}")


def test_small_gradients_feel_epsilon_outside_the_correction():
    options = OptimizerOptions(
        name="adamw_hf", lr=1.0, weight_decay=0.0, clip_norm=0.0, eps=1e-3, momentum_dtype="float32", decay=()
    )
    optimizer = make_optimizer(options)
    params, grads = {"w": jnp.zeros(1)}, {"w": jnp.full(1, 1e-3)}
    updates, _ = optimizer.update(grads, optimizer.init(params), params, multiplier=1.0)
    root = np.sqrt(1 - options.beta2)
    expected = root / (1 - options.beta1) * (1 - options.beta1) * 1e-3 / (root * 1e-3 + options.eps)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


def test_schedule():
    golden = load_golden("xvlm", "xvlm_util.npz")
    epochs, steps, warmup, lr = (float(v) for v in golden["sched.epochs_steps_warmfrac_lr"])
    total = round(epochs * steps)
    schedule = make_schedule(ScheduleOptions(kind="linear", warmup=round(warmup * total)), total)
    expected = golden["sched.lr"]
    assert schedule(0) == 0
    assert_close([lr * schedule(i) for i in range(len(expected))], expected, 1e-6, "schedule")
