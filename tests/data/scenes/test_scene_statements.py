"""Statements about scenes: what they say is checked from the words and the scenes, apart from how they were made."""

import collections
import re

import numpy as np
import pytest

from capvl.data.scenes import language, render, statements, world

OPTIONS = dict(most=4, zoom=1.2, plain=True, words=0.0)
NAMED = re.compile(rf"an? ({'|'.join(world.COLORS)}) ({'|'.join(world.SHAPES)})")


def shows(scene, color, shape):
    return any(t.color == color and t.shape == shape for t in scene.things)


def holds_of_pair(text, left, right):
    named = NAMED.findall(text)
    if not named:
        a, b = len(left.things), len(right.things)
        return a > b if "more objects" in text else a == b
    if len(named) == 2:
        return shows(left, *named[0]) and shows(right, *named[1])
    count = shows(left, *named[0]) + shows(right, *named[0])
    return {"both": count == 2, "at": count >= 1, "exactly": count == 1}[text.split()[0]]


@pytest.fixture
def scenes(monkeypatch):
    """The scenes that are drawn, in order."""
    drawn = []
    monkeypatch.setattr(render, "render", lambda scene, side: drawn.append(scene) or np.zeros((8, 8, 3), np.uint8))
    return drawn


def test_statements_about_pairs_are_true_where_they_say_so(scenes):
    """And each comes with two pairs of which it holds and two of which it doesn't."""
    made = [statements.make(0, "train", 64, 2, i, **OPTIONS) for i in range(48)]
    groups = collections.defaultdict(list)
    for example, left, right in zip(made, scenes[::2], scenes[1::2], strict=True):
        (row,) = example["questions"]
        assert (row["answer"] == "True") == holds_of_pair(row["question"], left, right), row
        assert len(example["images"]) == 2
        groups[row["id"].rsplit("-", 2)[0], row["question"]].append(row["answer"])
        for scene in (left, right):  # In plain scenes no colour is there twice.
            assert len({t.color for t in scene.things}) == len(scene.things)
    assert len(groups) == 12 and all(sorted(answers) == ["False"] * 2 + ["True"] * 2 for answers in groups.values())


def test_statements_about_one_scene_are_true_where_they_say_so():
    seen = collections.Counter()
    for i in range(60):
        scene = world.draw_scene(world.generator(0, "val", i), **OPTIONS)
        for kind, text, holds in statements.of_scene(scene, world.generator(0, "val", i, 1)):
            seen[kind, holds] += 1
            if kind == "exists":
                truth = shows(scene, *NAMED.findall(text)[0])
            elif kind == "count":
                truth = text.split()[2] == language.NUMBERS[len(scene.things)]
            else:
                first, where, second = re.fullmatch(r"the (.+) is (.+) the (.+)", text).groups()
                by_name = {t.short: t for t in scene.things}
                truth = language.relation(by_name[first], by_name[second]) == where
            assert truth == holds, text
    assert all(seen[kind, holds] > 12 for kind in ("exists", "count", "relation") for holds in (True, False))


def test_an_example_is_a_function_of_its_number():
    first, again, other = (statements.make(0, split, 16, 2, 5, **OPTIONS) for split in ("val", "val", "test"))
    assert first == again != other
