"""Scenes whose training images never have certain pairs of a colour and a shape."""

import collections

import pytest

from capvl.data.reading import sources
from capvl.data.reading.classes import categories
from capvl.data.reading.regions import FEATURES, regions
from capvl.data.scenes import examples, world
from capvl.data.scenes.builder import _of_classes


def test_every_color_and_shape_is_in_one_held_out_pair():
    colors, shapes = zip(*(pair.split() for pair in world.APART), strict=True)
    assert sorted(colors) == sorted(world.COLORS) and sorted(shapes) == sorted(world.SHAPES)
    assert len(world.PAIRS) == len(set(world.PAIRS)) == 64 and set(world.APART) < set(world.PAIRS)


@pytest.mark.parametrize("split", world.SPLITS)
def test_what_splits_show(data_dir, split):
    source = sources.open_source("scenes/pairs_apart_tiny", split, data_dir, features=("image", "text", *FEATURES))
    assert [row.name for row in categories(source)] == list(world.PAIRS)
    held_out, seen = set(world.APART), collections.Counter()
    for i in range(len(source)):
        found = regions(source[i])
        for region in found:
            assert world.PAIRS[region.label] == region.category
            assert region.phrases[0].endswith(region.category)
            seen[region.category] += 1
        there = {region.category for region in found} & held_out
        assert bool(there) == (split == "test")
        named = {pair for pair in held_out for text in source[i]["text"] if pair in text.decode()}
        assert named <= there
    if split != "test":
        color, shape = (collections.Counter(name.split()[i] for name in seen.elements()) for i in (0, 1))
        assert len(color) == len(shape) == 8 and min(*color.values(), *shape.values()) >= 3
    else:
        assert sum(seen[pair] for pair in held_out) >= len(source)
        assert set(seen) - held_out  # Others stand beside them.


def test_other_scenes_are_what_they_were(data_dir):
    source = sources.open_source("scenes/tiny", "train", data_dir, features=("image",))
    assert set(source.info.features["objects"].feature) == {
        "bbox", "phrase", "shape", "color", "size", "texture", "word"}  # fmt: skip
    drawn = [world.draw_scene(world.generator(0, "train", i), apart=how) for i in range(60) for how in ("", "never")]
    same = [a == b for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
    # Scenes that have no held-out pair by chance are drawn alike; the others are not.
    assert any(same) and not all(same)
    assert all(same[i] or any(t.short in world.APART for t in drawn[2 * i].things) for i in range(60))


def test_others_stand_unnamed_beside_the_held_out_pairs():
    options = dict(most=4, zoom=1.2, plain=True, words=0.0, apart="always")
    drawn = [examples.make(0, "train", 32, 0, i, **options)["objects"] for i in range(8)]
    named = [_of_classes(things, world.APART) for things in drawn]
    for things, own in zip(drawn, named, strict=True):
        pairs = [f"{thing['color']} {thing['shape']}" for thing in things]
        assert own and [thing["category"] for thing in own] == [pair for pair in pairs if pair in world.APART]
        assert all(thing["label"] == thing["category"] and thing["bbox"] for thing in own)
    assert sum(map(len, named)) < sum(map(len, drawn))
