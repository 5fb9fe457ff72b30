"""The index of evaluators: names of before, and what a model must be able to do."""

import importlib

import pytest

from capvl import recipes
from capvl.evals import EVALUATORS, RENAMED


@pytest.mark.parametrize("old", RENAMED)
def test_names_of_before_are_read_with_a_word(old, tiny, capsys):
    """As a key and as a type; the key, which names the results, stays; the workdir gets today's name."""
    recipes._said.clear()
    module, _, name = EVALUATORS[RENAMED[old]].partition(":")
    kind = getattr(importlib.import_module(module), name)
    recipe = recipes.resolve(tiny(evals={old: {}, "mine": {"type": old}}))
    assert {key: type(evaluator) for key, evaluator in recipe.evals.items()} == {old: kind, "mine": kind}
    assert recipe.source["evals"][old]["type"] == recipe.source["evals"]["mine"]["type"] == RENAMED[old]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(f"{old!r} is called {RENAMED[old]!r} now" in line for line in lines)
    recipes.resolve(recipe.source)
    recipes.resolve(tiny(evals={old: {}}))
    assert not capsys.readouterr().out  # Once is enough.
