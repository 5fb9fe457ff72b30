"""From images and prompts to boxes: sizes, several prompts, and what two of them find, with a hand-made detector."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handmade import COLORS
from PIL import Image
from pointing import NAMES, PointingOptions, tokenizer

from capvl.data.images.buckets import Bucket
from capvl.data.images.crops import Crop
from capvl.data.randomness import Uniforms
from capvl.data.text.category_prompts import Vocabulary
from capvl.errors import UserError
from capvl.inference.compiled import compiled
from capvl.inference.detecting import How, Seen, bucket_of, buckets, detect, prompts_of, states_of
from capvl.models.parameters import Blueprint

OPTIONS = PointingOptions()
RED, BLUE = (0.25, 0.25, 0.5, 0.75), (0.5, 0.5, 1.0, 1.0)


def png(boxes, size) -> bytes:
    pixels, buffer = np.zeros((*size, 3), np.uint8), io.BytesIO()
    for color, (x0, y0, x1, y1) in boxes.items():
        rows, columns = slice(round(y0 * size[0]), round(y1 * size[0])), slice(round(x0 * size[1]), round(x1 * size[1]))
        pixels[rows, columns] = COLORS[color]
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def seen(images, size):
    bucket = bucket_of(OPTIONS, size)
    made = Seen(Crop(OPTIONS.res, "aspect", max_side=OPTIONS.max_side, interpolation="bilinear").in_bucket(bucket))
    rows = [made({"image": image}, Uniforms(0, 0)) for image in images]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@functools.cache
def jitted(how):
    return compiled(Blueprint(OPTIONS), lambda model, rows: detect(model, *rows, how=how))


def found(rows, listed, states=True, **how):
    blueprint, asked = Blueprint(OPTIONS), prompts_of(listed)
    params = {k: jnp.ones(s.shape, s.dtype) for k, s in blueprint.shapes.items()}
    given = compiled(blueprint, states_of)(params, asked.tokens_RPL) if states else None
    return jax.device_get(jitted(How(**how))(params, (rows, asked, given)))


def test_boxes_are_those_of_the_upright_image(tmp_path):
    """Larger and smaller images than the model's, wide and tall ones: what is padded is no part of a box."""
    listed = Vocabulary(NAMES, tokenizer(tmp_path), OPTIONS.length).prompts()
    for size in ((128, 192), (64, 96), (192, 128), (32, 40), (64, 128)):
        result = found(seen([png({"red": RED, "blue": BLUE}, size)] * 2, size), listed)
        assert result.valid_BM.sum(axis=1).tolist() == [2, 2], size
        boxes = {int(label): box for label, box in zip(result.label_BM[1], result.box_BM4[1], strict=True)}
        np.testing.assert_allclose(boxes[0], RED, atol=0.04, err_msg=str(size))
        np.testing.assert_allclose(boxes[2], BLUE, atol=0.04, err_msg=str(size))
        assert result.score_BM[0, 2:].max() == 0 and set(result.label_BM[0, 2:]) == {-1}


def test_one_prompt_equals_several(tmp_path):
    vocabulary = Vocabulary(NAMES, tokenizer(tmp_path), OPTIONS.length)
    rows = seen([png({"red": RED, "blue": BLUE}, (64, 96)), png({"green": RED}, (64, 96))], (64, 96))
    expected = found(rows, vocabulary.prompts(), kept=4)
    assert len(vocabulary.prompts(1)) == 3
    for states in (True, False):
        several = found(rows, vocabulary.prompts(1), states, kept=4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, several)
    assert found(rows, vocabulary.prompts(1), most=5, kept=0).score_BM.shape == (2, 15)


def test_boxes_of_one_place(tmp_path):
    """Two names of one colour: two boxes, or across classes one, the better."""
    rows = seen([png({"red": RED, "blue": BLUE}, (64, 96))], (64, 96))
    listed = Vocabulary(["red thing", "red", "blue"], tokenizer(tmp_path), OPTIONS.length)
    assert found(rows, listed.prompts(1)).valid_BM.sum() == 3
    once = found(rows, listed.prompts(1), across=0.7)
    assert once.valid_BM.sum() == 2 and set(once.label_BM[0, :2]) == {1, 2}


def test_sizes():
    assert buckets(PointingOptions(res=800, max_side=1344)) == (Bucket(800, 1344), Bucket(1344, 800))
    assert buckets(PointingOptions(res=90, max_side=96)) == (Bucket(96, 96),)
    assert bucket_of(OPTIONS, (10, 11)) == Bucket(64, 96) and bucket_of(OPTIONS, (11, 10)) == Bucket(96, 64)
    # Longer images than the model's come to 90 pixels, not to 96.
    crop, image = Crop(60, "aspect", max_side=90), png({"red": RED}, (100, 300))
    row = Seen(crop.in_bucket(Bucket(64, 96)))({"image": image}, Uniforms(0, 0))
    assert row["image"].shape == (64, 96, 4) and row["size"].tolist() == row["whole"].tolist() == [30, 90]
    assert (row["image"][..., 3] > 0).sum() == 30 * 90


def test_wrong_options():
    with pytest.raises(UserError, match="'meen' is unknown. Did you mean 'mean'"):
        How(kind="meen")
    with pytest.raises(UserError, match="should be between 0 and 1"):
        How(across=-0.1)
    with pytest.raises(UserError, match="at least 1"):
        How(most=0)
