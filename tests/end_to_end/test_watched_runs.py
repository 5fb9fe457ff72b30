"""Runs that go by a number of their own evaluations, left alone and disturbed."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from capvl import recipes, train
from capvl.checkpoint import Checkpointer
from capvl.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")
LEAF = "decoder/logits/bias"
NUMBERS = (1.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0)
seen: dict[bytes, float] = {}
"""What was said of which parameters: the next of NUMBERS of those that are new."""


@dataclasses.dataclass(frozen=True)
class Told:
    """An evaluator that says what NUMBERS say, and the same of the same parameters."""

    name: str = "number"

    def setup(self, context):
        def evaluate(params):
            key = np.asarray(params[LEAF]).tobytes()
            yield self.name, seen.setdefault(key, NUMBERS[min(len(seen), len(NUMBERS) - 1)])

        return evaluate


@pytest.fixture
def values(tiny):
    """Evaluations after steps 2, 4, …: the best after 4, a drop after 8, the end after 10."""
    told = {"type": f"{__name__}:Told"}
    return tiny(
        steps=16,
        eval_every=2,
        optimizer={"lr": 3e-3, "ema": 0.5},
        schedule={"kind": "plateau", "warmup": 2, "patience": 2},
        watch={"metric": "val/number", "stop_patience": 3, "test": ("final",)},
        checkpoint={"every": 4, "keep": 1},
        evals={"val": told, "final": told},
    )


def lines_of(workdir) -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    return tmp_path_factory.mktemp("left_alone")


@pytest.fixture
def whole(values, left_alone):
    """The workdir of a run that nothing disturbs; made once."""
    if not (left_alone / "config.json").exists():
        seen.clear()
        train.run(recipes.resolve(values), str(left_alone))
    return left_alone


def test_rate_drops_training_ends_and_the_best_is_tested(whole, values, capsys):
    lines = lines_of(whole)
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert max(rates) == 10
    np.testing.assert_allclose([rates[8], rates[9], rates[10]], [3e-3, 3e-4, 3e-4], rtol=1e-5)
    told = [line["val/number"] for line in lines if "val/number" in line]
    assert told == [1.0, 3.0, 2.0, 2.0, 2.0]
    assert not any("final/number" in line for line in lines)
    assert Checkpointer(str(whole)).steps() == [4, 10]
    leaves, step = Checkpointer(str(whole)).read_all()
    kept = {k.removeprefix("watched."): v.item() for k, v in leaves.items() if k.startswith("watched.")}
    assert step == 10
    assert kept == {"best": 3.0, "best_step": 4, "stale": 3, "waited": 1, "drops": 1, "evaluated": 10}
    assert json.loads((whole / "evaluations.jsonl").read_text()) == {"step": 4, "final/number": 3.0}
    # The evaluators look at the running mean.
    mean, _ = Checkpointer(str(whole)).read_params(None, step=4)
    raw, _ = Checkpointer(str(whole)).read_params(None, step=4, ema=False)
    assert seen[mean[LEAF].tobytes()] == 3.0
    assert raw[LEAF].tobytes() not in seen
    # Begun again it is over at once, and tested again.
    train.run(recipes.resolve(values), str(whole))
    assert "val/number is 3.0000 after step 4, and no later evaluation of 3 is better" in capsys.readouterr().out
    assert lines_of(whole) == lines
    (whole / "evaluations.jsonl").write_text('{"step": 4, "final/number": 3.0}\n')


def kill(when: str, patch) -> None:
    """Lets a run die, or be stopped by a signal, after step 8: the evaluation, the drop and a save belong to it."""

    def at_8(call, dies):
        def method(self, *args):
            state = args[0]
            if int(np.asarray(state.step)) == 8:
                if not dies:
                    call(self, *args)
                raise KeyboardInterrupt
            return call(self, *args)

        return method

    if when == "signal":
        patch.setattr(train.Stop, "now", lambda self, step: step == 8)
    elif when == "evaluating":
        patch.setattr(train.Run, "watch", at_8(train.Run.watch, True))
    elif when == "before the save":
        patch.setattr(train.Run, "save", at_8(train.Run.save, True))
    elif when == "after the save":
        patch.setattr(train.Run, "save", at_8(train.Run.save, False))


LONG = [pytest.param(when, marks=pytest.mark.long) for when in ("evaluating", "after the save")]


@pytest.mark.parametrize("when", ["signal", "before the save", *LONG])
def test_a_disturbed_run_ends_as_if_nothing_had_happened(whole, values, tmp_path, monkeypatch, when):
    recipe = recipes.resolve(values)
    with monkeypatch.context() as patch:
        kill(when, patch)
        if when == "signal":
            train.run(recipe, str(tmp_path))
        else:
            with pytest.raises(KeyboardInterrupt):
                train.run(recipe, str(tmp_path))
    before = Checkpointer(str(tmp_path)).read_all()
    assert before[1] == {"signal": 8, "evaluating": 4, "before the save": 4, "after the save": 8}[when]
    assert before[0]["watched.evaluated"] == {"signal": 6, "after the save": 8}.get(when, 4)
    train.run(recipe, str(tmp_path))
    (found, step), (expected, wanted) = Checkpointer(str(tmp_path)).read_all(), Checkpointer(str(whole)).read_all()
    assert step == wanted
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    by_step = {(line["step"], "loss" in line): line for line in lines_of(tmp_path)}
    for line in lines_of(whole):
        own = by_step[line["step"], "loss" in line]
        assert all(own[k] == line[k] for k in ("loss", "lr", "val/number") if k in line), line["step"]
    assert json.loads((tmp_path / "evaluations.jsonl").read_text()) == {"step": 4, "final/number": 3.0}


def test_a_number_that_is_not_there_ends_the_run_at_the_first_evaluation(values, tmp_path):
    values["evals"]["val"] = values["evals"]["val"] | {"name": "numbr"}
    with pytest.raises(UserError, match="none of what was evaluated at step 2: val/numbr. Did you mean"):
        train.run(recipes.resolve(values), str(tmp_path))


def test_an_evaluator_that_is_not_there_ends_the_run_at_once(values, tmp_path):
    values["watch"] = values["watch"] | {"metric": "vall/number"}
    with pytest.raises(UserError, match="no evaluator 'vall' in config.evals. Did you mean 'val'"):
        train.run(recipes.resolve(values), str(tmp_path))


def test_what_decides_can_not_change_in_the_middle(whole, values):
    before = (whole / "config.json").read_text()
    for changes, words in (
        ({"eval_every": 4}, "eval_every: 2 there, 4 here"),
        ({"evals": {**values["evals"], "val": {**values["evals"]["val"], "name": "x"}}}, "evals.val.name"),
        ({"watch": values["watch"] | {"stop_patience": 9}}, "watch.stop_patience: 3 there, 9 here"),
    ):
        with pytest.raises(UserError, match=words):
            train.run(recipes.resolve(values | changes), str(whole))
    assert (whole / "config.json").read_text() == before
