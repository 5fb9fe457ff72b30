"""Recipes: every config file resolves, and what a user mistypes is named."""

import glob
import os
import pathlib
import re

import jax
import pytest
from conftest import ROOT

from capvl import config
from capvl.errors import UserError
from capvl.parallel.mesh import MeshOptions, make_mesh

CONFIGS = sorted(glob.glob(os.path.join(ROOT, "configs", "*.py")))
DEMO = os.path.join(ROOT, "configs", "cappa_demo.py")


@pytest.mark.parametrize("path", CONFIGS, ids=os.path.basename)
def test_every_config_builds_its_state(path):
    recipe = config.load(path)
    header = pathlib.Path(path).read_text().split('"""')[1]
    for field in ("COMMAND", "DATA", "CHIPS", "EXPECTED"):
        assert re.search(rf"^{field} ", header, re.MULTILINE), f"{path} does not state its {field}"
    mesh = make_mesh(MeshOptions())
    state = recipe.train_step().abstract_state(mesh)
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(state))
    assert config.resolve(recipe.source) == recipe


def test_paper_sizes_have_the_known_number_of_parameters():
    from capvl.models.parameters import count

    for name, millions in (("b16", 85.8), ("l16", 303.3)):  # ViT-B/16, ViT-L/16 without heads (arXiv 2010.11929)
        shapes = config.load(os.path.join(ROOT, f"configs/cappa_{name}.py")).train_step().blueprint.shapes
        assert count(shapes, "encoder/.*") / 1e6 == pytest.approx(millions, rel=5e-3)


def test_variants_and_overrides():
    recipe = config.load(DEMO + ":pa=0,batch=1k", [("optimizer.lr", "3e-4"), ("data.crop_scale", "(0.5, 1)")])
    assert (recipe.objective.pa, recipe.batch_size, recipe.optimizer.lr) == (0.0, 1024, 3e-4)
    assert recipe.data.crop_scale == (0.5, 1.0)


@pytest.mark.parametrize(
    "spec, overrides, words",
    [
        ("configs/cappa_dem.py", [], ["cappa_dem.py", "cappa_demo.py"]),
        (DEMO + ":pp=0", [], ["pp", "'pa'"]),
        (DEMO + ":pa", [], ["name=value"]),
        (DEMO, [("optimizer.learning_rat", "1")], ["optimizer.learning_rat", "Known: "]),
        (DEMO, [("optimizer.weight_deca", "1")], ["'weight_decay'"]),
        (DEMO, [("optimiser.lr", "1")], ["'optimizer'"]),
        (DEMO, [("stepss", "1")], ["'steps'"]),
        (DEMO, [("steps", "many")], ["steps should be a whole number", "'many'"]),
        (DEMO, [("steps", "1.5")], ["steps should be a whole number"]),
        (DEMO, [("optimizer.lr", "fast")], ["optimizer.lr should be a number"]),
        (DEMO, [("model.unroll", "1")], ["model.unroll should be True or False"]),
        (DEMO, [("model.encoder", "XL/16")], ["'XL'"]),
        (DEMO, [("model.encoder", "nano16")], ["SIZE/PATCH"]),
        (DEMO, [("model.res", "63")], ["model.res=63", "64"]),
        (DEMO, [("model.pool", "mapp")], ["'map'"]),
        (DEMO, [("objective.name", "capa")], ["'cappa'"]),
        (DEMO, [("objective.pa", "2")], ["objective.pa must be between 0 and 1"]),
        (DEMO, [("evals.perplexityy.split", "test")], ["'perplexity'"]),
        (DEMO, [("evals.perplexity.spli", "test")], ["'split'"]),
        (DEMO, [("schedule.kind", "cosin")], ["'cosine'"]),
        (DEMO, [("batch_size", "0")], ["batch_size must be at least 1"]),
        (DEMO, [("optimizer.decay", "[['(', 1.0]]")], ["not a regular expression"]),
        (DEMO, [("data.crop_scale", "(0.5,)")], ["data.crop_scale should be 2 values"]),
    ],
)
def test_what_is_mistyped_is_named(spec, overrides, words):
    with pytest.raises(UserError) as error:
        config.load(spec, overrides)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_schedule_that_does_not_fit(tiny_recipe):
    with pytest.raises(UserError, match="don't fit into steps=6"):
        tiny_recipe(schedule__warmup=10).train_step()


def test_failing_config_file(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def get_config():\n  return undefined\n")
    with pytest.raises(UserError, match="fails: NameError"):
        config.load(str(file))
    file.write_text("x = 1\n")
    with pytest.raises(UserError, match="no function get_config"):
        config.load(str(file))


def test_resuming_another_recipe_is_refused(tiny_recipe):
    old = tiny_recipe().source
    config.check_same(old, tiny_recipe(batch_size=32, log_every=3, model__remat="full").source, "w")
    for changes in ({"seed": 1}, {"optimizer__lr": 1.0}, {"model__length": 13}, {"data__crop": "center"}):
        with pytest.raises(UserError, match="another recipe"):
            config.check_same(old, tiny_recipe(**changes).source, "w")
