"""A workdir is whole: it holds its tokenizer, and another one is an error."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from conftest import ROOT
from etils import epath

import capvl
from capvl import evaluation, metrics, recipes, train, workdirs
from capvl.convert import __main__ as convert
from capvl.data.scenes import making
from capvl.data.text import tokenizers as tokenizer
from capvl.data.text import training
from capvl.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")
WORDS = ["a circle", "two red squares", "green and blue", "nothing but a triangle in a corner"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir, one_device):
    """(values of its recipe, workdir of a run of two steps, the tokenizer that it was given)."""
    from conftest import tiny_values

    folder = tmp_path_factory.mktemp("whole")
    own = folder / "mine.model"
    shutil.copyfile(making.scenes_tokenizer(data_dir), own)
    values = tiny_values(data_dir) | {"steps": 2, "evals": {"perplexity": {"limit": 20}}}
    values["data"] |= {"tokenizer": str(own)}
    train.run(recipes.resolve(values), str(folder / "run"))
    return values, folder / "run", own


@pytest.fixture
def moved(trained, tmp_path):
    """The same run elsewhere, its tokenizer's own path gone; and another vocabulary of the same size."""
    values, workdir, own = trained
    there = tmp_path / "elsewhere"
    shutil.copytree(workdir, there)
    values = json.loads(json.dumps(values).replace(str(own), str(tmp_path / "gone.model")))
    file = there / "config.json"
    file.write_text(file.read_text().replace(str(own), str(tmp_path / "gone.model")))
    other = tmp_path / "other.model"
    training.train(WORDS * 20, 40, other)
    return values, there, str(other)


def test_a_moved_run_is_the_same_model(trained, moved):
    _, workdir, own = trained
    _, there, _ = moved
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    here, elsewhere = capvl.load(str(workdir)), capvl.load(str(there))
    assert pathlib.Path(elsewhere.tokenizer.path).parent == there
    assert elsewhere.tokenizer.pieces() == tokenizer.load(str(own)).pieces()
    np.testing.assert_array_equal(here.score([image], WORDS[:3]), elsewhere.score([image], WORDS[:3]))
    rows = evaluation.evaluate(str(there))
    assert rows == evaluation.evaluate(str(workdir))


def test_resuming_without_the_file_that_the_recipe_names(moved, capsys):
    values, there, _ = moved
    train.run(recipes.resolve(values), str(there))
    assert "Resumed after step 2" in capsys.readouterr().out


def test_resuming_with_the_same_vocabulary_elsewhere(trained, moved, tmp_path, capsys):
    values, there, _ = moved
    values["data"]["tokenizer"] = str(shutil.copyfile(trained[2], tmp_path / "same.model"))
    train.run(recipes.resolve(values), str(there))
    assert "Resumed after step 2" in capsys.readouterr().out


def test_another_vocabulary_is_an_error(moved):
    values, there, other = moved
    before = {file: file.read_bytes() for file in there.rglob("*") if file.is_file()}
    values["data"]["tokenizer"] = other
    with pytest.raises(UserError, match=r"other.model' is not the one that the run .* was begun with"):
        train.run(recipes.resolve(values), str(there))
    words = r"has another vocabulary than .*tokenizer.model': id \d+ is "
    with pytest.raises(UserError, match=words):
        evaluation.evaluate(str(there), [("data.tokenizer", other)])
    with pytest.raises(UserError, match=words):
        capvl.load(str(there), tokenizer=other)
    after = {file: file.read_bytes() for file in there.rglob("*") if file.is_file()}
    for file in ("config.json", "tokenizer.model", "metrics.jsonl"):
        assert after[there / file] == before[there / file]


def test_a_config_does_not_bring_another_tokenizer(trained, tmp_path):
    """`capvl.evaluate --config` takes the data, never the vocabulary, from elsewhere."""
    values, workdir, _ = trained
    spec = tmp_path / "other_data.py"
    changed = values | {"data": values["data"] | {"tokenizer": ""}}
    spec.write_text(f"def get_config():\n  return {changed!r}\n")
    assert evaluation.evaluate(str(workdir), spec=str(spec)) == evaluation.evaluate(str(workdir))


def test_a_first_start_that_failed_binds_nothing(moved, tmp_path):
    values, there, other = moved
    workdir = tmp_path / "new"
    workdir.mkdir()
    shutil.copy(there / "tokenizer.model", workdir)
    values["data"]["tokenizer"] = other
    train.run(recipes.resolve(values), str(workdir))
    assert (workdir / "tokenizer.model").read_bytes() == pathlib.Path(other).read_bytes()


def test_begun_from_another_vocabulary(trained, moved, tiny, tmp_path):
    """Text parameters mean nothing under other ids; an encoder has none."""
    _, workdir, _ = trained
    _, _, other = moved
    recipe = recipes.resolve(tiny(init_from=str(workdir), data__tokenizer=other))
    with pytest.raises(UserError, match="has another vocabulary"):
        train.run(recipe, str(tmp_path / "a"))
    encoder = tiny(init_from=str(workdir), init_only=("encoder/.*",), data__tokenizer=other)
    train.run(recipes.resolve(encoder), str(tmp_path / "b"))


@pytest.mark.parametrize("name", ["xvlm_grounding", "xvlm_nlvr2", "xvlm_vqa"])
def test_models_that_read_texts_without_a_text_tower_have_a_tokenizer(name):
    """Else weights for another vocabulary would go in unseen."""
    recipe = recipes.load(os.path.join(ROOT, f"configs/{name}.py"))
    assert workdirs.tokenizer_named(recipe).endswith("tokenizers/xvlm/vocab.txt")


@pytest.fixture
def old(moved):
    """Written before workdirs held copies, and its tokenizer's own path gone."""
    _, there, _ = moved
    (there / "tokenizer.model").unlink()
    return there


def test_an_old_workdir_whose_tokenizer_is_gone(trained, old, tmp_path, capsys):
    """Nothing to compare with: the user says which one it is."""
    own = trained[2]
    with pytest.raises(UserError, match="has no tokenizer; give one"):
        _ = capvl.load(str(old)).tokenizer
    assert capvl.load(str(old), tokenizer=own).tokenizer.path == str(own)
    assert evaluation.evaluate(str(old), [("data.tokenizer", str(own))])
    convert.main(["--from=capvl", "--to=capvl", str(old), str(tmp_path / "converted")])
    assert "without a tokenizer" in capsys.readouterr().out
    assert capvl.load(str(tmp_path / "converted"), tokenizer=own).tokenizer.path == str(own)


def test_an_old_workdir_whose_data_is_elsewhere(old):
    """The embedded data set's tokenizer is made anew, where it can be."""
    values = json.loads((old / "config.json").read_text())
    values["data"] |= {"tokenizer": "", "data_dir": str(old / "config.json/data")}
    (old / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="has no tokenizer; give one"):
        _ = capvl.load(str(old)).tokenizer


def test_other_files_beside_the_tokenizer(trained, moved):
    _, there, _ = moved
    (there / "tokenizer.model.bak").write_text("x")
    (there / "tokenizer.txt").mkdir()
    assert capvl.load(str(there)).tokenizer.path == str(there / "tokenizer.model")
    (there / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="There are tokenizer.model and tokenizer.json in .*remove"):
        capvl.load(str(there))


def test_a_broken_copy_can_be_mended(trained, moved):
    values, there, _ = moved
    shutil.copyfile(trained[2], values["data"]["tokenizer"])
    (there / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="tokenizer.model' is not a SentencePiece model. Remove it"):
        train.run(recipes.resolve(values), str(there))
    (there / "tokenizer.model").unlink()
    train.run(recipes.resolve(values), str(there))
    assert (there / "tokenizer.model").read_bytes() == trained[2].read_bytes()


def test_settings_of_the_tokenizer_are_part_of_it(trained, moved, tmp_path):
    """A run that was begun with settings is not gone on with without them."""
    values, there, _ = moved
    values["data"]["tokenizer"] = str(shutil.copyfile(trained[2], tmp_path / "same.model"))
    (there / "tokenizer_config.json").write_text(json.dumps({"clean": "lower"}, indent=1))
    with pytest.raises(UserError, match="is not the one that the run"):
        train.run(recipes.resolve(values), str(there))


@pytest.mark.parametrize("name", ["plain", "v1.0.model", "mine.MODEL", "mine.tmp"])
def test_any_name_of_a_tokenizer_has_a_copy(trained, tiny_recipe, tmp_path, name):
    workdir = metrics.open_workdir(str(tmp_path / "new"))
    workdirs.write(workdir, tiny_recipe(), str(shutil.copyfile(trained[2], tmp_path / name)))
    assert workdirs.find_tokenizer(workdir).read_bytes() == trained[2].read_bytes()


def test_an_old_workdir_keeps_its_path(trained, tmp_path):
    """Written before workdirs held copies."""
    _, workdir, own = trained
    old = tmp_path / "old"
    shutil.copytree(workdir, old)
    (old / "tokenizer.model").unlink()
    assert capvl.load(str(old)).tokenizer.path == str(own)


def test_workdir_of_another_recipe(tiny_recipe, tmp_path):
    workdirs.write(metrics.open_workdir(str(tmp_path)), tiny_recipe(), "")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match="belongs to another recipe .optimizer.lr: 0.003 there, 0.1 here"):
        train.run(tiny_recipe(optimizer__lr=0.1), str(tmp_path))
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_workdir_from_before_a_key_was_there(tiny_recipe, tmp_path):
    """New options have defaults that change nothing, so they hinder no resuming."""
    workdirs.write(metrics.open_workdir(str(tmp_path)), tiny_recipe(), "")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    values = json.loads((tmp_path / "config.json").read_text())
    del values["data"]["crop_fraction"], values["model"]["layer_scale"], values["spike"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    path = epath.Path(tmp_path)
    workdirs.check(path, tiny_recipe())
    with pytest.raises(UserError, match=r"model.layer_scale: 0.0 there, 0.1 here"):
        workdirs.check(path, tiny_recipe(model__layer_scale=0.1))
    values["data"]["gone_by_now"] = 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"data.gone_by_now: 1 there, None here"):
        workdirs.check(path, tiny_recipe())
