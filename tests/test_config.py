"""Recipes: every config file resolves, and what a user mistypes is named."""

import glob
import math
import os
import pathlib
import re

import jax
import pytest
from conftest import ROOT

from capvl import recipes
from capvl.errors import UserError
from capvl.parallel.mesh import MeshOptions, make_mesh

CONFIGS = sorted(glob.glob(os.path.join(ROOT, "configs", "*.py")))
DEMO = os.path.join(ROOT, "configs", "cappa_demo.py")


@pytest.mark.parametrize("path", CONFIGS, ids=os.path.basename)
def test_every_config_builds_its_state(path):
    recipe = recipes.load(path)
    header = pathlib.Path(path).read_text().split('"""')[1]
    for field in ("COMMAND", "DATA", "CHIPS", "EXPECTED"):
        assert re.search(rf"^{field} ", header, re.MULTILINE), f"{path} does not state its {field}"
    mesh = make_mesh(MeshOptions())
    state = recipe.train_step().abstract_state(mesh)
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(state))
    assert recipes.resolve(recipe.source) == recipe


@pytest.mark.parametrize("path", CONFIGS, ids=os.path.basename)
def test_every_config_divides_over_the_chips_that_it_names(path):
    recipe, header = recipes.load(path), pathlib.Path(path).read_text().split('"""')[1]
    for chips in re.findall(r"\bv\d\w*:(\d+(?:x\d+)+)", header):
        own, left = divmod(recipe.batch_size, math.prod(map(int, chips.split("x"))) * recipe.micro_batches)
        assert not left
        if not getattr(recipe.objective, "frequencies", ""):  # A file of the user's.
            recipe.objective.check(recipe.model, own, recipe.micro_batches)


@pytest.mark.parametrize("path", [p for p in CONFIGS if "/xvlm_" in p and "demo" not in p], ids=os.path.basename)
def test_images_of_x_vlm_are_squashed_in_evaluations(path):
    """As the official code has them in all tasks."""
    assert recipes.load(path).data.still_crop == "squash"


def test_paper_sizes_have_the_known_number_of_parameters():
    from capvl.models.parameters import count

    for name, millions in (("b16", 85.8), ("l16", 303.3)):  # ViT-B/16, ViT-L/16 without heads (arXiv 2010.11929)
        shapes = recipes.load(os.path.join(ROOT, f"configs/cappa_{name}.py")).train_step().blueprint.shapes
        assert count(shapes, "encoder/.*") / 1e6 == pytest.approx(millions, rel=5e-3)


def test_variants_and_overrides():
    recipe = recipes.load(DEMO + ":pa=0,batch=1k", [("optimizer.lr", "3e-4"), ("data.crop_scale", "(0.5, 1)")])
    assert (recipe.objective.pa, recipe.batch_size, recipe.optimizer.lr) == (0.0, 1024, 3e-4)
    assert recipe.data.crop_scale == (0.5, 1.0)


TEXTS = ["2017_01", "1.10", "2024_05", "00123", "1e5", "True", "None", "0x10", "(a)", "{}", "~/a b", "'2017_01'"]


@pytest.mark.parametrize("text", TEXTS)
def test_what_should_be_text_stays_text(text, tmp_path):
    """By the type of the key, in overrides and in variants; quotes around a whole text are none of it."""
    meant = text.strip("'")
    keys = ("wandb", "data.name", "data.tokenizer", "evals.perplexity.split")
    recipe = recipes.load(DEMO, [(key, text) for key in keys])
    found = (recipe.wandb, recipe.data.name, recipe.data.tokenizer, recipe.evals["perplexity"].split)
    assert found == (meant,) * 4 and all(type(value) is str for value in found)
    assert recipes.resolve(recipe.source) == recipe
    assert recipes.load(f"{DEMO}:wandb={text}").wandb == meant


def test_texts_in_lists():
    shown = recipes.load(DEMO, [("init_only", "(1.10, '2017_01', cifar-10)"), ("optimizer.decay", "[['a', 1]]")])
    assert shown.init_only == ("1.10", "2017_01", "cifar-10")
    assert shown.optimizer.decay == (("a", 1.0),)
    assert recipes.load(DEMO, [("evals", "{}")]).evals == {}


def test_types_of_ones_own_evaluator(tmp_path, monkeypatch):
    """Options of "module:Class" get the types of that class."""
    (tmp_path / "mine_evals.py").write_text(
        "import dataclasses\nfrom typing import Any, Literal\n@dataclasses.dataclass(frozen=True)\nclass Mine:\n"
        "  a: str = ''\n  b: str | None = 'x'\n  c: int | None = None\n  d: Any = 0\n  e: dict[str, str] = None\n"
        "  f: list[str] = ()\n  g: Literal['1.10', 'b'] = 'b'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    texts = {"type": "mine_evals:Mine", "a": "1.10", "b": "2017_01", "c": "5", "d": "1.10", "e": "{1.10: 2_0}"}
    texts |= {"f": "[1.10, b]", "g": "1.10"}
    pairs = [("evals", "{'perplexity': {}}"), *((f"evals.perplexity.{key}", text) for key, text in texts.items())]
    mine = recipes.load(DEMO, pairs).evals["perplexity"]
    assert (mine.a, mine.b, mine.c, mine.d, mine.g) == ("1.10", "2017_01", 5, 1.1, "1.10")
    assert mine.e == {"1.10": "2_0"} and mine.f == ["1.10", "b"]
    assert recipes.load(DEMO, [*pairs, ("evals.perplexity.b", "None")]).evals["perplexity"].b is None


def test_numbers_for_texts_in_a_file_are_named(tiny):
    """A file's 2017_01 is a number to Python, whose text is another."""
    with pytest.raises(UserError, match="data.name should be a text, not the number 201701; put it in quotes"):
        recipes.resolve(tiny(data__name=2017_01))
    with pytest.raises(UserError, match="objective should be a section of keys, not 'cappa'"):
        recipes.resolve(tiny(objective="cappa"))


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
        (DEMO, [("data.crop_scale", "(0.5,)")], ["data.crop_scale should be 2 values, not (0.5,)"]),
        (DEMO, [("data.crop_scale", "(0.5, x)")], ["data.crop_scale[1] should be a number, not 'x'"]),
        (DEMO, [("init_only", "cider")], ["init_only should be a list, not 'cider'"]),
    ],
)
def test_what_is_mistyped_is_named(spec, overrides, words):
    with pytest.raises(UserError) as error:
        recipes.load(spec, overrides)
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
        recipes.load(str(file))
    file.write_text("x = 1\n")
    with pytest.raises(UserError, match="no function get_config"):
        recipes.load(str(file))


def test_resuming_another_recipe_is_refused(tiny_recipe):
    old = tiny_recipe().source
    recipes.check_same(old, tiny_recipe(batch_size=32, log_every=3, model__remat="full").source, "w")
    for changes in ({"seed": 1}, {"optimizer__lr": 1.0}, {"model__length": 13}, {"data__crop": "center"}):
        with pytest.raises(UserError, match="another recipe"):
            recipes.check_same(old, tiny_recipe(**changes).source, "w")


def test_how_streams_are_read_is_no_other_recipe_where_there_are_none(tiny_recipe):
    old = tiny_recipe(data__readers=1, data__index="here").source
    recipes.check_same(old, tiny_recipe(data__readers=32, data__window=7).source, "w")
    old = tiny_recipe(data__name="stream:/x/*.tar", data__readers=1, data__index="here").source
    recipes.check_same(old, tiny_recipe(data__name="stream:/x/*.tar", data__readers=1).source, "w")
    with pytest.raises(UserError, match="another recipe .data.readers: 1 there, 32 here"):
        recipes.check_same(old, tiny_recipe(data__name="stream:/x/*.tar").source, "w")


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([("optimizer.lr", "1e999")], "optimizer.lr should be a finite number, not inf"),
        ([("spike", "1e999")], "spike should be a finite number"),
        ([("schedule.end", "-1e999")], "schedule.end should be a finite number"),
        ([("model.registers", "-1")], "registers and layer_scale must not be negative"),
        ([("model.layer_scale", "-0.1")], "registers and layer_scale must not be negative"),
        ([("model.eps", "0")], "eps must be positive"),
        ([("evals.perplexity.limit", "-1")], "Perplexity: limit must not be negative"),
        ([("evals.fewshot.seeds", "(-1,)")], "seeds and l2 not negative"),
        ([("optimizer.decay", "(('no/such', 1.0),)")], "optimizer.decay: 'no/such' matches no parameter"),
        ([("optimizer.lr_mult", "(('encoder', 1.0),)")], "optimizer.lr_mult: 'encoder' matches no parameter"),
        ([("objective.mask_ratio", "0.01"), ("objective.pa", "0.5")], "mask_ratio=0.01 masks none of model.length"),
    ],
)
def test_values_that_can_only_be_mistakes(overrides, words):
    with pytest.raises(UserError, match=re.escape(words)):
        recipe = recipes.load(DEMO, overrides)
        recipe.train_step()
        recipe.objective.check(recipe.model, 16, 1)
