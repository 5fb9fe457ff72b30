"""The record of a watched number: bests, waiting, drops, the end."""

import jax
import numpy as np
import pytest

from capvl.errors import UserError
from capvl.optim import watching
from capvl.optim.schedules import ScheduleOptions
from capvl.optim.watching import WatchOptions

PLATEAU = ScheduleOptions(kind="plateau", patience=2, factor=0.1)


def records(values, options, schedule=PLATEAU):
    """The record after each of some evaluations, 10 steps apart."""
    watched, found = jax.device_get(watching.fresh(options)), []
    for i, value in enumerate(values, 1):
        watched = watching.record(watched, value, 10 * i, options, schedule)
        assert [x.dtype for x in watched] == [x.dtype for x in watching.fresh(options)]
        found.append(watched)
    return found


@pytest.mark.parametrize("lower", [False, True])
def test_what_is_recorded(lower):
    options = WatchOptions("detection/AP", lower=lower, stop_patience=5)
    sign = -1 if lower else 1
    # An equal one is no new best. The rate drops after two without one, and after two more.
    found = records([sign * v for v in (1, 3, 3, 2, 1, 0, 2, 4)], options)
    assert [sign * float(w.best) for w in found] == [1, 3, 3, 3, 3, 3, 3, 4]
    assert [int(w.best_step) for w in found] == [10, 20, 20, 20, 20, 20, 20, 80]
    assert [int(w.stale) for w in found] == [0, 0, 1, 2, 3, 4, 5, 0]
    assert [int(w.waited) for w in found] == [0, 0, 1, 0, 1, 0, 1, 0]
    assert [int(w.drops) for w in found] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [int(w.evaluated) for w in found] == list(range(10, 90, 10))
    assert [watching.ends(w, options) for w in found] == [False] * 6 + [True, False]
    assert not any(watching.ends(w, WatchOptions("detection/AP")) for w in found)
    np.testing.assert_allclose(watching.rate(jax.device_put(found[-1]), PLATEAU), 0.01, rtol=1e-6)


def test_only_a_plateau_drops():
    options = WatchOptions("detection/AP")
    found = records([1.0, 0.0, 0.0, 0.0], options, ScheduleOptions(kind="constant"))
    assert [int(w.drops) for w in found] == [0] * 4
    assert watching.rate(found[-1], ScheduleOptions(kind="constant")) == 1.0
    assert watching.fresh(WatchOptions()) == ()


def test_the_comparison_is_of_what_is_kept():
    """A float64 that differs from the best by less than float32 holds is none: a resumed run couldn't tell."""
    found = records([0.1, 0.1 + 1e-12], WatchOptions("detection/AP"))
    assert int(found[-1].stale) == 1


@pytest.mark.parametrize(
    "rows, words",
    [
        ({"detection/AP50": 0.1, "loss/x": 1.0}, "none of what was evaluated at step 7: detection/AP50. Did you mean"),
        ({"detection/not_finite": 3.0}, "none of what was evaluated at step 7: detection/not_finite"),
        ({"detection/AP": float("nan")}, "is nan at step 7"),
    ],
)
def test_no_number(rows, words):
    with pytest.raises(UserError, match=words):
        watching.number(WatchOptions("detection/AP"), rows, 7)


@pytest.mark.parametrize(
    "options, changes, words",
    [
        (dict(metric="detection/AP"), {}, "no evaluator 'detection'"),
        (dict(metric="detectoin/AP", test=("fin",)), {"evals": {"detection": 0}}, "Did you mean 'detection'"),
        (dict(metric="detection/AP", test=("fin",)), {"evals": {"detection": 0, "final": 0}}, "Did you mean 'final'"),
        (dict(metric="detection/AP", test=("detection",)), {"evals": {"detection": 0}}, "runs after training"),
        (dict(metric="detection/AP", stop_patience=2), {"eval_every": 0}, "need eval_every"),
        (dict(metric="detection/AP"), {"eval_every": 0, "schedule": PLATEAU}, "need eval_every"),
        (dict(), {"schedule": PLATEAU}, "needs watch.metric"),
        (dict(stop_patience=2), {}, "need watch.metric"),
        (dict(metric="detection/AP", stop_patience=-1), {}, "must not be negative"),
    ],
)
def test_nothing_to_watch(options, changes, words):
    given = {"schedule": ScheduleOptions(kind="constant"), "eval_every": 5, "evals": {}} | changes
    with pytest.raises(UserError, match=words):
        made = WatchOptions(**options)
        watching.check(made, given["schedule"], given["eval_every"])
        watching.check_evaluators(made, given["evals"])
