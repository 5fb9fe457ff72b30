"""The embedded data set: deterministic, and true."""

import json
import os
import pathlib

import numpy as np
import pytest

from capvl.data.images.decode import decode
from capvl.data.reading import sources
from capvl.data.scenes import examples, language, render, world

ALL = ("image", "text", "label", "objects", "questions", "index")


@pytest.fixture(scope="module")
def source(data_dir):
    return sources.open_source("scenes/tiny", "train", data_dir, features=ALL)


def test_an_example_is_a_function_of_seed_split_and_index():
    first = examples.make(0, "train", 64, 0, 5)
    assert examples.make(0, "train", 64, 0, 5) == first
    for other in ((1, "train", 5), (0, "val", 5), (0, "train", 6)):
        assert examples.make(other[0], other[1], 64, 0, other[2])["image"] != first["image"]


def test_splits_do_not_share_images(data_dir):
    images = {}
    for split in world.SPLITS:
        part = sources.open_source("scenes/tiny", split, data_dir, features=("image",))
        images[split] = {part[i]["image"] for i in range(len(part))}
        assert len(images[split]) == len(part)
    assert not images["train"] & images["val"]
    assert not images["val"] & images["test"]


def test_facts_are_those_of_the_scene(source):
    for i in range(0, len(source), 17):
        example = source[i]
        scene = world.draw_scene(world.generator(0, "train", int(example["index"])))
        assert 2 <= len(scene.things) <= 6
        assert [p.decode() for p in example["objects"]["phrase"]] == [t.phrase for t in scene.things]
        for thing, (ymin, xmin, ymax, xmax) in zip(scene.things, example["objects"]["bbox"], strict=True):
            np.testing.assert_allclose((xmin, ymin, xmax, ymax), thing.box, atol=1e-6)
        shaped = [t.shape for t in scene.things if not t.word]
        assert [*world.SHAPES, "word"][example["label"]] == (shaped[0] if shaped else "word")
        assert len({t.decode() for t in example["text"]}) == 4


def test_boxes_hold_their_objects_colors(source):
    """The centre of a plain object has its colour; so boxes and pixels agree."""
    seen = 0
    for i in range(60):
        example = source[i]
        image = decode(example["image"]).astype(np.float32)
        things = example["objects"]
        for shape, texture, color, box in zip(
            things["shape"], things["texture"], things["color"], things["bbox"], strict=True
        ):
            if texture != b"plain" or shape in (b"ring", b"word"):
                continue
            y, x = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            pixel = image[round(y * 63), round(x * 63)]
            assert np.abs(pixel - world.COLORS[color.decode()]).max() < 70, (i, shape, color)
            seen += 1
    assert seen > 20


def test_answers_are_true(source):
    kinds = set()
    for i in range(len(source)):
        example = source[i]
        scene = world.draw_scene(world.generator(0, "train", int(example["index"])))
        rows = zip(*(example["questions"][k] for k in ("kind", "question", "answer")), strict=True)
        for kind, question, answer in ((k.decode(), q.decode(), a.decode()) for k, q, a in rows):
            kinds.add(kind)
            if kind == "count":
                assert language.NUMBERS.index(answer) == len(scene.things)
            elif kind == "exists":
                asked = question.removeprefix("is there ").split(" ", 1)[1]
                assert answer == ("yes" if any(t.short == asked for t in scene.things) else "no")
            elif kind == "color":
                shape = question.rsplit(" ", 1)[1]
                assert [t.color for t in scene.things if t.shape == shape] == [answer]
            elif kind == "reading":
                assert answer in [t.word for t in scene.things]
    assert kinds == {"count", "place", "color", "texture", "shape", "exists", "reading"}


def test_plain_scenes():
    """No patterns, no colour twice, no questions after patterns; words as often as is asked."""
    drawn = [
        (r, world.draw_scene(r, plain=True, words=0.75)) for r in (world.generator(0, "val", i) for i in range(80))
    ]
    for rng, scene in drawn:
        assert {t.texture for t in scene.things} == {"plain"}
        assert len({t.color for t in scene.things}) == len(scene.things)
        assert "texture" not in [row["kind"] for row in language.questions(scene, rng)]
    assert 50 <= sum(any(t.word for t in scene.things) for _, scene in drawn) <= 70


def test_relations():
    a = world.Thing("circle", "red", "small", "plain", 0.2, 0.5)
    b = world.Thing("square", "blue", "small", "plain", 0.8, 0.6)
    assert language.relation(a, b) == "left of"
    assert language.relation(b, a) == "right of"
    above = world.Thing("ring", "cyan", "small", "plain", 0.25, 0.1)
    assert language.relation(above, a) == "above"
    assert (a.place, b.place, above.place) == ("left", "right", "top left")
    assert language.a("orange ring") == "an orange ring"


def test_clips_move_as_they_say():
    for i in range(20):
        clip = world.draw_clip(world.generator(0, "train", i), 8)
        first, last = clip.frame(0).things, clip.frame(7).things
        moved = [t for t in last if t not in first]
        start = clip.scene.things[clip.moving]
        assert len(moved) <= 1
        for thing in moved:
            dx, dy = world.MOTIONS[clip.direction]
            assert (thing.x - start.x) * dx + (thing.y - start.y) * dy > 0
            assert min(thing.box) >= 0 and max(thing.box) <= 1
        assert clip.direction in language.clip_captions(clip)[0]


def test_clips_data_set(data_dir):
    clips = sources.open_source("scenes/clips_tiny", "train", data_dir, features=("frames", "text", "direction"))
    frames = clips[0]["frames"]
    assert len(frames) == 4
    assert decode(bytes(frames[0])).shape == (64, 64, 3)
    assert clips[0]["direction"].decode() in world.MOTIONS


@pytest.mark.parametrize("side", [64, 128])
def test_picture_size(side):
    scene = world.draw_scene(world.generator(0, "test", 0))
    image = render.render(scene, side)
    assert image.shape == (side, side, 3)
    assert image.dtype == np.uint8


def test_data_set_is_plain_tfds(data_dir):
    folder = os.path.join(data_dir, "scenes", "tiny", "1.0.0")
    info = json.loads(pathlib.Path(folder, "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    assert {s["name"] for s in info["splits"]} == set(world.SPLITS)
