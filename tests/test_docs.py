"""What the documents name exists."""

import glob
import importlib.util
import os
import pathlib
import re

import pytest
from conftest import ROOT

DOCUMENTS = [os.path.join(ROOT, "README.md"), *sorted(glob.glob(os.path.join(ROOT, "docs", "*.md")))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=os.path.basename)
def test_named_things_exist(path):
    text = pathlib.Path(path).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert os.path.exists(os.path.join(os.path.dirname(path), target)), f"broken link {target}"
    for module in re.findall(r"python -m (capvl[\w.]*)", text):
        assert importlib.util.find_spec(module), f"no module {module}"
    for config in re.findall(r"configs/(\w+\.py)", text):
        assert os.path.exists(os.path.join(ROOT, "configs", config)), f"no config {config}"
    for name in re.findall(r"`(capvl\.\w+(?:\.\w+)*\.[A-Z]\w+)`", text):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    for file in re.findall(r"`(capvl/[\w/]+\.py)`", text):
        assert os.path.exists(os.path.join(ROOT, file)), file


def test_own_objective_of_the_docs_trains(tmp_path, tiny, monkeypatch):
    """The code of docs/own_objective.md, as it stands there, on the smallest data set."""
    from capvl import recipes, train

    text = pathlib.Path(ROOT, "docs", "own_objective.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "rotation.py").write_text(blocks[0])
    (tmp_path / "rotation_demo.py").write_text(blocks[1])
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 50
    monkeypatch.syspath_prepend(str(tmp_path))
    assert recipes.load(str(tmp_path / "rotation_demo.py")).model.classes == 4
    values = tiny(steps=3, objective={"name": "rotation:Rotation"})
    values["model"] = {"encoder": "w16d1h2m32/16", "res": 32, "classes": 4, "dtype": "float32"}
    recipe = recipes.resolve(values)
    assert recipes.resolve(recipe.source).source == recipe.source
    train.run(recipe, str(tmp_path / "run"))
    assert "accuracy" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_evaluators_and_configs_are_in_the_docs():
    from capvl.evals import EVALUATORS

    evaluation, recipes = (pathlib.Path(ROOT, "docs", f"{n}.md").read_text() for n in ("evaluation", "recipes"))
    for name in EVALUATORS:
        assert f"| `{name}` |" in evaluation, name
    for config in glob.glob(os.path.join(ROOT, "configs", "*.py")):
        name = os.path.basename(config)[:-3]
        family, _, size = name.rpartition("_")
        named = f"`{name}.py`" in recipes or re.search(rf"`{family}_{{[^}}]*\b{size}\b[^}}]*}}\.py`", recipes)
        assert named, name
