"""Learning-rate curves: those of GLIP's golden/glip/glip_misc.json, and what can't be a schedule."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, assert_close

from capvl.errors import UserError
from capvl.optim.optimizer import OptimizerOptions, make_optimizer
from capvl.optim.schedules import ScheduleOptions, make_decay_schedule, make_schedule


def golden(name: str) -> dict:
    path = os.path.join(GOLDEN, "glip", "glip_misc.json")
    if not os.path.exists(path):
        pytest.skip(f"golden file {path} is absent (set CAPVL_GOLDEN)")
    with open(path) as file:
        return json.load(file)[name]


@pytest.mark.golden
def test_steps():
    found = golden("lr_multistep")
    args, expected = found["args"], np.array(found["values"])
    steps = len(expected)
    options = ScheduleOptions(
        kind="steps",
        warmup=args["warmup_iters"],
        warmup_from=args["warmup_factor"],
        factor=args["gamma"],
        milestones=tuple(m / steps for m in args["milestones"]),
    )
    values = np.array([make_schedule(options, steps)(step) for step in range(steps)], np.float64)
    np.testing.assert_allclose(args["lr"] * values, expected, rtol=1e-6)


@pytest.mark.golden
def test_cosine_to_an_end():
    """The reference counts the cosine's steps without those of the warm-up."""
    found = golden("lr_cosine")
    args, expected = found["args"], np.array(found["values"])
    options = ScheduleOptions(
        warmup=args["warmup_iters"], warmup_from=args["warmup_factor"], end=args["eta_min"] / args["lr"]
    )
    schedule = make_schedule(options, args["max_iters"] + args["warmup_iters"])
    assert_close([args["lr"] * float(schedule(i)) for i in range(len(expected))], expected, 1e-6)


def test_weight_decay_falls_ahead_of_the_rate():
    options = ScheduleOptions(kind="steps", warmup=0, decay_ahead=0.667)
    rate, decay = make_schedule(options, 100), make_decay_schedule(options, 100)
    # 0.667 * 67 = 44.7, 0.667 * 89 = 59.4.
    for step, wanted in (
        (0, (1, 1)),
        (44, (1, 1)),
        (45, (1, 0.1)),
        (60, (1, 0.01)),
        (67, (0.1, 0.01)),
        (89, (0.01, 0.01)),
    ):
        assert_close([rate(step), decay(step)], wanted, 1e-6, f"step {step}")
    assert make_decay_schedule(ScheduleOptions(kind="steps"), 100) is None
    for name in ("adamw", "adamw_hf"):
        optimizer = make_optimizer(OptimizerOptions(name=name, lr=0.0 if name == "adamw" else 1.0, weight_decay=0.5))
        params, none = {"a/kernel": jnp.ones((2,))}, {"a/kernel": jnp.zeros((2,))}
        state = optimizer.init(params)
        for cut, wanted in ((None, 0.5), (jnp.float32(0.1), 0.05), (jnp.float32(0.0), 0.0)):
            one = jnp.float32(1.0)
            changes, _ = optimizer.update(none, state, params, multiplier=one, decay_multiplier=cut)
            assert_close(changes["a/kernel"], [wanted, wanted], 1e-6, f"{name} {cut}")


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(kind="step"), "Did you mean 'steps'"),
        (dict(kind="steps", milestones=(0.9, 0.6)), "rising fractions"),
        (dict(kind="steps", milestones=(67.0, 89.0)), "rising fractions"),
        (dict(kind="steps", factor=0.0), "above 0"),
        (dict(kind="plateau", patience=0), "at least 1"),
        (dict(warmup_from=2.0), "between 0 and 1"),
        (dict(decay_ahead=0.667), "needs schedule.kind='steps'"),
    ],
)
def test_no_schedule(values, words):
    with pytest.raises(UserError, match=words):
        ScheduleOptions(**values)
