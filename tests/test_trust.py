"""What comes from elsewhere runs no code: recipes in workdirs, features of data sets."""

import json
import pathlib
import shutil
import sys

import pytest

import capvl
from capvl import evaluation, recipes
from capvl.convert import formats
from capvl.convert.load import load_parameters
from capvl.data.reading import sources
from capvl.errors import UserError

CODE = """
import dataclasses, pathlib
pathlib.Path(__file__).with_name("ran").touch()
from capvl.objectives.cappa import CapPa

class Mine(CapPa):
    pass

Mine = dataclasses.dataclass(frozen=True)(Mine)

class Plain:
    pass

@dataclasses.dataclass(frozen=True)
class Evaluator:
    def setup(self, context):
        return lambda params: []
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch, tiny):
    """A module that leaves a mark when it runs, and a function that makes a workdir with changes of its recipe."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "theirs.py").write_text(CODE)
    monkeypatch.syspath_prepend(code)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)

    def make(**changes) -> str:
        workdir = tmp_path / "run"
        shutil.rmtree(workdir, ignore_errors=True)
        (workdir / "checkpoints").mkdir(parents=True)
        (workdir / "config.json").write_text(json.dumps(recipes.resolve(tiny()).source | changes))
        return str(workdir)

    yield make, code / "ran"
    sys.modules.pop("theirs", None)


OBJECTIVE = {"objective": {"name": "theirs:Mine"}}
EVALUATOR = {"evals": {"one": {"type": "theirs:Evaluator"}}}


def test_loading_imports_nothing(theirs, tiny_recipe):
    make, ran = theirs
    for function in (
        capvl.load,
        evaluation.evaluate,
        lambda path: formats.read("capvl", path),
        lambda path: load_parameters(path, tiny_recipe().model),
    ):
        with pytest.raises(UserError, match=r"objective.name='theirs:Mine' names code to import.*trust"):
            function(make(**OBJECTIVE))
    with pytest.raises(UserError, match=r"evals.one.type='theirs:Evaluator' names code"):
        evaluation.evaluate(make(**EVALUATOR))
    with pytest.raises(UserError, match="There is no checkpoint"):  # Its evaluators are not asked.
        capvl.load(make(**EVALUATOR))
    assert not ran.exists()


def test_what_is_trusted_is_imported(theirs):
    make, ran = theirs
    workdir = make(**OBJECTIVE)
    for call in (
        lambda: capvl.load(workdir, trust=True),
        lambda: formats.read("capvl", workdir, trust=True),
        lambda: evaluation.evaluate(workdir, trust=True),
        lambda: evaluation.evaluate(workdir, [("objective.name", "theirs:Mine")]),
    ):
        with pytest.raises(UserError, match="There is no checkpoint"):
            call()
        assert ran.exists()
        ran.unlink()
        sys.modules.pop("theirs")


def test_one_config_does_not_speak_for_another_name(theirs, tmp_path):
    """--config=FILE.py trusts what that file names, not what the workdir names."""
    make, ran = theirs
    workdir = make(**OBJECTIVE)
    spec = tmp_path / "own.py"
    spec.write_text(f"def get_config():\n  return {recipes.load('configs/cappa_demo.py').source!r}\n")
    with pytest.raises(UserError, match="theirs:Mine"):
        evaluation.evaluate(workdir, spec=str(spec))
    assert not ran.exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("theirs:Plain", "is no dataclass"),
        ("json:dumps", "is no dataclass"),
        ("theirs:Evaluator", "is no objective"),
        ("theirs:None_such", "can't be imported: AttributeError"),
        ("no_such_module:Thing", "can't be imported: ModuleNotFoundError"),
        ("fails:Thing", "can't be imported: ZeroDivisionError"),
        ("leaves:Thing", "can't be imported: SystemExit"),
        (":Thing", "can't be imported: ValueError"),
        ("theirs:", "can't be imported: AttributeError"),
    ],
)
def test_what_is_no_objective_is_one_sentence(theirs, tiny, name, words):
    _, ran = theirs
    (ran.parent / "fails.py").write_text("1 / 0")
    (ran.parent / "leaves.py").write_text("raise SystemExit(0)")
    with pytest.raises(UserError, match=words):
        recipes.resolve(tiny(objective={"name": name}))


@pytest.mark.parametrize("text", ["[]", '"x"', "3", "null", "{", "\xff", '{"objective": 5}', '{"evals": [1]}'])
def test_odd_recipes(theirs, text):
    make, _ = theirs
    workdir = make()
    pathlib.Path(workdir, "config.json").write_bytes(text.encode("latin-1"))
    for function in (capvl.load, evaluation.evaluate):
        with pytest.raises(UserError):
            function(workdir)


FEATURES = "tensorflow_datasets.core.features.features_dict.FeaturesDict"


@pytest.mark.parametrize("spelling", ["pythonClassName", "python_class_name", "type", "text", "json", "twice"])
def test_features_of_a_data_set_import_nothing(theirs, data_dir, tmp_path, spelling):
    _, ran = theirs
    folder = tmp_path / "prepared"
    shutil.copytree(sources.find("scenes/tiny", data_dir), folder)
    assert sources.splits(str(folder))
    inner = {spelling: "theirs.Feature", "content": {}}
    if spelling == "text":
        inner = {"type": FEATURES, "proto_cls": "FeaturesDict"}
        inner["content"] = json.dumps({"features": {"a": {"pythonClassName": "theirs.Feature"}}})
    if spelling in ("json", "twice"):
        text = json.dumps({"a": {"type": "theirs.Feature", "content": {}}})
        if spelling == "twice":
            text = json.dumps({"b": {"pythonClassName": FEATURES, "jsonFeature": {"json": text}}})
        inner = {"pythonClassName": FEATURES, "jsonFeature": {"json": text}}
    features = json.loads((folder / "features.json").read_text())
    features["featuresDict"]["features"]["odd"] = inner
    (folder / "features.json").write_text(json.dumps(features))
    for function in (sources.splits, lambda path: sources.open_source(path, "train")):
        with pytest.raises(UserError, match=r"names code to import, 'theirs.Feature'"):
            function(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["theirs.Feature", "Feature", "tensorflow_datasets", "tensorflow_datasets/theirs.Feature"]
)
def test_names_of_features_that_are_not_of_tfds(theirs, data_dir, tmp_path, name):
    folder = tmp_path / "prepared"
    shutil.copytree(sources.find("scenes/tiny", data_dir), folder)
    (folder / "features.json").write_text(json.dumps({"pythonClassName": name}))
    with pytest.raises(UserError, match="names code to import"):
        sources.splits(str(folder))


ODD = [
    "null",
    "[]",
    "3",
    '"x"',
    "{}",
    '{"pythonClassName": "tensorflow_datasets.None"}',
    '{"a": 1}',
    "[" * 100_000,
    "\xff",
]


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("text", ODD)
def test_odd_data_sets_are_one_sentence(data_dir, tmp_path, file, text):
    folder = tmp_path / "prepared"
    shutil.copytree(sources.find("scenes/tiny", data_dir), folder)
    (folder / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError):
        sources.splits(str(folder))


@pytest.mark.parametrize("changes", [{"objective": {"name": ["a"]}}, {"evals": {"one": {"type": {}}}}])
def test_names_that_are_no_texts(tiny, changes):
    with pytest.raises(UserError, match="should be a name, not"):
        recipes.resolve(tiny(**changes))


def test_a_recipe_without_data(theirs, tiny):
    make, _ = theirs
    file = pathlib.Path(make(), "config.json")
    values = json.loads(file.read_text())
    del values["data"]
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="There is no checkpoint"):
        evaluation.evaluate(str(file.parent))
