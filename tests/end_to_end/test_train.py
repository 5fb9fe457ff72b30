"""Whole runs: training, resuming, evaluating, reporting."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from capvl import config, evaluation, metrics, recipes, report, reporting, train
from capvl.checkpoint import Checkpointer
from capvl.errors import UserError
from capvl.parallel.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("one_device")
EVALS = {
    "perplexity": {"limit": 40},
    "image_gain": {"limit": 40},
    "fewshot": {"name": "scenes/tiny", "shots": (1, 2), "seeds": (0,)},
    "pixels": {"type": "fewshot", "name": "scenes/tiny", "shots": (2,), "seeds": (0,), "features": "pixels"},
    "captions": {"count": 5},
}


@pytest.fixture
def losses_of():
    def read(workdir):
        lines = [json.loads(line) for line in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    return read


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir, one_device):
    """A finished run with every evaluator: (workdir, what it printed, how often the step was compiled)."""
    import contextlib
    import io

    from conftest import tiny_values

    values = tiny_values(data_dir) | {
        "optimizer": {"lr": 3e-3, "ema": 0.5},
        "log_every": 2,
        "eval_every": 3,
        "evals": EVALS,
    }
    workdir = tmp_path_factory.mktemp("finished")
    compiled = []
    loop = train.loop

    def counting(training, state, stop):
        out = loop(training, state, stop)
        compiled.append(training.update._cache_size())
        return out

    train.loop = counting
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            train.run(recipes.resolve(values), str(workdir))
    finally:
        train.loop = loop
    return workdir, printed.getvalue(), compiled


def test_one_compilation_in_a_whole_run(finished):
    assert finished[2] == [1]


def test_what_a_run_prints(finished):
    workdir, printed, _ = finished
    line = r"step 4/6 \(66\.7%\)  loss \d+\.\d{4}  img/s \d+\.\d  img/s/chip \d+\.\d  data \d+\.\d%  ETA \d+s"
    assert re.search(line, printed)
    for words in ("objective", "encoder/blocks/attn/qkv/kernel", "perplexity/cap/perplexity", "M parameters"):
        assert words in printed
    assert f"Report: {workdir / 'report.html'}" in printed


def test_results_and_report(finished):
    workdir, _, _ = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    results = {k: v for line in lines for k, v in line.items() if "/" in k}
    assert results["image_gain/cap/low"] <= results["image_gain/cap/gain"] <= results["image_gain/cap/high"]
    assert results["perplexity/unigram/perplexity"] < results["perplexity/pa/perplexity"] * 2
    assert {"fewshot/1shot", "fewshot/2shot", "pixels/2shot", "captions/distinct"} <= results.keys()
    page = (workdir / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert page.count("<svg") >= 3
    assert "http://" not in re.sub(r"http://www\.w3\.org|http://purl\.org|http://creativecommons\.org", "", page)
    assert list((workdir / "tensorboard").glob("events*"))


def test_report_of_two_runs(finished, tmp_path):
    workdir, _, _ = finished
    report.main([str(workdir), str(workdir), f"--out={tmp_path / 'both.html'}"])
    assert (tmp_path / "both.html").read_text().count("<figure>") == 10
    with pytest.raises(UserError, match="no metrics.jsonl"):
        report.main([str(tmp_path)])


def test_evaluating_again_gives_the_same_numbers(finished, data_dir, tmp_path):
    workdir, _, _ = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    during = {k: v for line in lines for k, v in line.items() if "/" in k and line["step"] == 6}
    rows = evaluation.evaluate(str(workdir), only=["perplexity", "fewshot"])
    assert rows
    for name, value in rows.items():
        assert value == pytest.approx(during[name], rel=1e-6), name
    report.main([str(workdir), f"--out={tmp_path / 'again.html'}"])
    page = (tmp_path / "again.html").read_text()
    _, again = page.split("evaluated again, step 6", 1)
    name, value = next((k, v) for k, v in rows.items() if "/" in k)
    assert f"<tr><td>{name}</td><td>{value:.4f}</td></tr>" in again
    untrained = evaluation.evaluate(str(workdir), only=["perplexity"], untrained=True)
    assert untrained["perplexity/cap/nll_per_token"] > rows["perplexity/cap/nll_per_token"]
    changed = evaluation.evaluate(str(workdir), [("evals.perplexity.split", "test")], only=["perplexity"])
    assert changed["perplexity/cap/nll"] != rows["perplexity/cap/nll"]


def test_evaluations_by_another_config_are_told_apart(tmp_path, capsys):
    reporting.save_evaluation(tmp_path, 3, {"x/y": 1.0}, {}, overrides=[("a", "b")], config="other.py")
    (line,) = metrics.read_evaluations(tmp_path)
    assert reporting._evaluated(line) == ("step 3 by other.py a=b", [("x/y", "1.0000")])
    assert "after step 3 by other.py a=b" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(only=["perplexit"]), "Did you mean 'perplexity'"),
        (dict(step=5), "no checkpoint of step 5"),
        (dict(overrides=[("evals.perplexity.split", "nope")]), "no split 'nope'"),
    ],
)
def test_evaluations_that_can_not_be_made(finished, arguments, words):
    with pytest.raises(UserError, match=words):
        evaluation.evaluate(str(finished[0]), **arguments)


def test_no_run_to_evaluate(tmp_path):
    with pytest.raises(UserError, match="no workdir of a run"):
        evaluation.evaluate(str(tmp_path))


def test_finished_run_starts_again_without_a_step(finished, capsys):
    workdir, _, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    recipe = recipes.resolve(json.loads((workdir / "config.json").read_text()))
    train.run(recipe, str(workdir))
    assert "Resumed after step 6" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == before


def test_parameters_of_a_run_begin_another(finished, tiny_recipe, tmp_path):
    from capvl.convert import __main__ as convert
    from capvl.convert.load import load_parameters

    workdir, _, _ = finished
    own = load_parameters(str(workdir), tiny_recipe().model)
    for scan in ([], ["--scan"]):
        file = tmp_path / f"{len(scan)}.npz"
        convert.main(["--from=capvl", "--to=big_vision", *scan, str(workdir), str(file)])
        there = load_parameters(str(file), tiny_recipe().model)
        assert there.keys() == own.keys()
        for name, value in own.items():
            np.testing.assert_array_equal(there[name], value, err_msg=name)
    larger = load_parameters(str(workdir), tiny_recipe(model__res=64).model)
    assert larger["encoder/positions"].shape == (16, 16)
    with pytest.raises(UserError, match="decoder.positions is float32"):
        load_parameters(str(workdir), tiny_recipe(model__length=9).model)
    np.savez(tmp_path / "pickle.npz", x=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="plain arrays"):
        load_parameters(str(tmp_path / "pickle.npz"), tiny_recipe().model)
    with pytest.raises(UserError, match="neither a run's workdir"):
        load_parameters("weights.pt", tiny_recipe().model)


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny_recipe, tmp_path, losses_of, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.run(tiny_recipe(), str(whole))
    # Killed after step 3, that is between two checkpoints.
    log = train.Run.log

    def killed(self, step, values):
        if step == 3:
            raise KeyboardInterrupt
        log(self, step, values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "log", killed)
        train.run(tiny_recipe(), str(cut))
    train.run(tiny_recipe(), str(cut))
    expected, found = losses_of(whole), losses_of(cut)
    assert found.keys() >= {3, 4, 5, 6} - {3}
    assert all(found[step] == expected[step] for step in found)
    assert_same_checkpoints(whole, cut)


def assert_same_checkpoints(a, b):
    first, step = Checkpointer(str(a)).read_params(None)
    second, other = Checkpointer(str(b)).read_params(None)
    assert step == other
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


def test_too_many_bad_steps_stop_the_run_and_save_nothing(tiny_recipe, tmp_path, monkeypatch):
    from capvl.objectives.cappa import CapPa

    loss = CapPa.loss

    def poisoned(self, model, batch, key):
        value, metrics = loss(self, model, batch, key)
        return value * jax.numpy.nan, metrics

    monkeypatch.setattr(CapPa, "loss", poisoned)
    with pytest.raises(UserError, match="3 steps in a row up to step 3"):
        train.run(tiny_recipe(max_skipped=3, checkpoint={"every": 3}), str(tmp_path))
    assert Checkpointer(str(tmp_path)).steps() == []


def test_implicit_transfers_are_errors(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(train.loader, "to_device", lambda batch, sharding: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train.run(tiny_recipe(), str(tmp_path))


def test_workdir_that_can_not_be_written(tiny_recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        train.run(tiny_recipe(), str(tmp_path / "file" / "run"))


def test_batch_that_does_not_divide(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_mesh", make_mesh)
    with pytest.raises(UserError, match="batch_size=12 doesn't divide over 8 data-parallel devices"):
        train.run(tiny_recipe(batch_size=12), str(tmp_path))


def test_data_set_that_is_not_prepared(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match="'flickr8k' is neither known nor prepared.*capvl.data.prepare tars"):
        train.run(tiny_recipe(data__name="flickr8k"), str(tmp_path))


def test_tokenizer_that_is_not_there(tiny_recipe, data_dir, tmp_path):
    recipe = tiny_recipe(data__name=f"{data_dir}/scenes/tiny/1.0.0")
    with pytest.raises(UserError, match="data.tokenizer is not set; train one with"):
        train.run(recipe, str(tmp_path / "a"))
    recipe = tiny_recipe(data__tokenizer="{data_dir}/none.model")
    with pytest.raises(UserError, match="none.model' is missing"):
        train.run(recipe, str(tmp_path / "b"))


@pytest.mark.long
def test_profile(tiny_recipe, tmp_path, capsys):
    train.run(tiny_recipe(steps=4, profile=(2, 2)), str(tmp_path))
    assert "Profile of steps 2 to 3" in capsys.readouterr().out
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
