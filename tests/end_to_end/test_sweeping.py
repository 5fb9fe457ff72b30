"""Sweeps over data sets, shots, seeds and recipes: probes of a tiny encoder."""

import json

import pytest
from launching import CONFIG

from capvl import sweeping, train
from capvl.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def config(tiny, tmp_path):
    """A config file of a probe that is watched and tested."""
    values = tiny(
        steps=4,
        eval_every=2,
        objective={"name": "probe"},
        model={"encoder": "w16d1h2m32/16", "res": 32, "classes": 9, "dtype": "float32"},
        schedule={"kind": "plateau", "warmup": 0},
        watch={"metric": "val/val", "test": ("final",)},
        evals={"val": {"type": "probe"}, "final": {"type": "probe"}},
    )
    values["variants"] = {"rate": "optimizer.lr"}
    file = tmp_path / "probe.py"
    file.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    return str(file)


@pytest.mark.long
def test_a_sweep_that_is_stopped_goes_on_where_it_was(config, data_dir, tmp_path, monkeypatch, capsys):
    datasets = ["scenes/tiny", f"{data_dir}/scenes/tiny/1.0.0"]
    tokenizer = ("data.tokenizer", f"{data_dir}/scenes/tokenizer_128.model")
    made = sweeping.cells([f"probe={config}"], datasets, "0,1*3", "3,30", [tokenizer])
    assert [cell.facts() for cell in made[:3]] == [
        {"dataset": "scenes/tiny", "shots": 0, "seed": 3, "mode": "probe"},
        {"dataset": "scenes/tiny", "shots": 1, "seed": 3, "mode": "probe"},
        {"dataset": "scenes/tiny", "shots": 1, "seed": 30, "mode": "probe"},
    ]
    assert len(made) == 6
    # 8 images three times are two batches of 16.
    recipe = made[1].recipe(epochs=3)
    assert (recipe.steps, recipe.eval_every, recipe.seed) == (6, 2, 3)
    trained, run = [], train.run
    monkeypatch.setattr(train, "run", lambda recipe, workdir: (trained.append(workdir), run(recipe, workdir)))
    with monkeypatch.context() as patch:
        patch.setattr(train.Stop, "now", lambda self, step: len(trained) == 2)
        rows = sweeping.run(made, str(tmp_path / "out"))
    assert len(rows) == 2 and len(trained) == 2
    assert "start again with the same --out" in capsys.readouterr().out
    rows = sweeping.run(made, str(tmp_path / "out"))
    # The one that was stopped goes on, and two are new.
    assert len(trained) == 5 and trained[2] == trained[1]
    assert [{k: row[k] for k in ("dataset", "shots", "seed", "mode")} for row in rows] == [c.facts() for c in made]
    assert json.loads((tmp_path / "out/rows.json").read_text()) == rows
    assert rows[0]["accuracy"] == rows[3]["accuracy"], "the same data by two names"
    out = capsys.readouterr().out
    for row in rows:
        assert {"accuracy", "val", "chance"} <= row.keys()
    of_zero = [row["val"] for row in rows if row["shots"] == 0]
    assert f"| 0 | {50 * sum(of_zero):.1f} | {100 * of_zero[0]:.1f} | {100 * of_zero[1]:.1f} |" in out
    sweeping.run(made, str(tmp_path / "out"))
    assert len(trained) == 5
    # What is finished is of its recipe, trained or not, and began with the same weights.
    changes = [("optimizer.lr", "0.5"), ("init_from", "elsewhere")]
    for shots, change in zip(("0", "1*3"), changes, strict=True):
        other = sweeping.cells([f"probe={config}"], datasets[:1], shots, "3", [tokenizer, change])
        with pytest.raises(
            UserError, match=f"shots_seed3' belongs to another recipe .{change[0]}: .* here.; remove it"
        ):
            sweeping.run(other, str(tmp_path / "out"))


def test_numbers_by_mode_and_shots():
    rows = [
        {"dataset": dataset, "shots": shots, "seed": seed, "mode": mode, "AP": value}
        for mode, shots, dataset, seed, value in (
            ("full", 1, "a", 3, 0.1), ("full", 1, "a", 30, 0.3), ("full", "all", "a", 3, 0.5), ("heads", 1, "b", 3, 0.9)
        )
    ]  # fmt: skip
    full, heads = {"1": {"a": [0.1, 0.3]}, "all": {"a": [0.5]}}, {"1": {"b": [0.9]}}
    assert sweeping.by_mode(rows, "AP") == {"full": full, "heads": heads}
    with pytest.raises(UserError, match="--number=AP50: the test of 'a' gave AP"):
        sweeping.by_mode(rows, "AP50")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((["probe.py"], ["a"], "1", "0"), "should read MODE=FILE.py"),
        ((["a=probe.py"], ["a"], "1+2", "0"), "--shots should read as"),
        ((["a=probe.py"], ["a"], "1", "x"), "--seeds as"),
        ((["a=probe.py"], ["a", "a"], "1", "0"), "stands there twice"),
        ((["a=probe.py"], ["a"], "1,1*8", "0"), "stands there twice"),
    ],
)
def test_no_sweep(arguments, words):
    with pytest.raises(UserError, match=words):
        sweeping.cells(*arguments)


def test_a_recipe_has_to_say_on_what_is_tested(config, tmp_path):
    changes = [("watch.test", "()")]
    with pytest.raises(UserError, match="has to name one evaluator in watch.test"):
        sweeping.run(sweeping.cells([f"a={config}"], ["scenes/tiny"], "all", "0", changes), str(tmp_path / "out"))
