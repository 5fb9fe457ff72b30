"""Lists in fixed slots."""

import numpy as np
import pytest
from handmade import Letters, picture

from capvl.data.examples.slots import choose, fill
from capvl.data.images.crops import Crop
from capvl.data.images.geometry import WHOLE
from capvl.data.randomness import Uniforms
from capvl.objectives.scst import ImageReferences

BLANK = {"box": np.zeros(4, np.float32), "text": np.zeros(3, np.int32)}


def row(n):
    return {"box": np.full(4, n, np.float32), "text": np.full(3, n, np.int32)}


def test_evaluation_takes_the_first_and_training_draws():
    things = list(range(10))
    assert choose(things, 4, None) == [0, 1, 2, 3] and choose(things, 12, None) == things
    drawn = [choose(things, 4, Uniforms(0, n)) for n in range(2000)]
    assert all(len(set(row)) == 4 for row in drawn)
    np.testing.assert_allclose(np.bincount(np.ravel(drawn), minlength=10) / 2000, 0.4, atol=0.04)
    assert drawn == [choose(things, 4, Uniforms(0, n)) for n in range(2000)]
    assert sorted(choose(things, 12, Uniforms(0, 0))) == things and things == list(range(10))
    assert choose([], 3, Uniforms(0, 0)) == choose([], 3, None) == []


@pytest.mark.parametrize("count", [0, 2, 4])
def test_slots_and_their_mask(count):
    out = fill([row(n + 1) for n in range(count)], 4, BLANK)
    assert out["slots"].tolist() == [True] * count + [False] * (4 - count)
    for key, blank in BLANK.items():
        assert out[key].shape == (4, *blank.shape) and out[key].dtype == blank.dtype
        assert out[key][:, 0].tolist() == [*range(1, count + 1), *[0] * (4 - count)]


def test_a_blank_may_be_other_than_zero():
    out = fill([], 2, {"label": np.int32(-1)})
    assert out["label"].tolist() == [-1, -1] and out["label"].dtype == np.int32


def test_an_image_and_its_text_is_one_slot():
    out = fill([{"box": np.array(WHOLE, np.float32), "text": np.array([5, 6, 1], np.int32)}], 1, BLANK)
    assert out["box"].tolist() == [[0, 0, 1, 1]] and out["slots"].tolist() == [True]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 rows for 2 slots"):
        fill([row(0)] * 3, 2, BLANK)
    with pytest.raises(ValueError, match=r"'text' of shape \(4,\) in a slot of \(3,\)"):
        fill([row(0) | {"text": np.zeros(4, np.int32)}], 2, BLANK)
    with pytest.raises(ValueError, match="'text' of float32 in a slot of int32"):
        fill([row(0) | {"text": np.full(3, 0.5, np.float32)}], 2, BLANK)


def test_references_are_drawn_as_ever():
    """Captions without their ends: the numbers are what the objective made before there were slots."""
    made = ImageReferences(Crop(8), Letters(), 4, 2, np.zeros(0, np.int32))
    example = {"image": picture(), "text": ["a", "b", "c"]}
    assert [made(example, Uniforms(0, n))["references"].tolist() for n in range(3)] == [
        [[7, 0, 0, 0], [5, 0, 0, 0]],
        [[5, 0, 0, 0], [6, 0, 0, 0]],
        [[6, 0, 0, 0], [5, 0, 0, 0]],
    ]
    one = made(example | {"text": ["a"]}, Uniforms(0, 0))["references"]
    assert one.tolist() == [[5, 0, 0, 0], [0, 0, 0, 0]]
