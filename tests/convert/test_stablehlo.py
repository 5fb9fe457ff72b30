"""Exported functions give what the model gives, for any batch."""

import dataclasses
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from handmade import picture
from PIL import Image
from pointing import NAMES, PointingOptions, scene, tokenizer
from test_convert import run, weights_of

from capvl.convert import folder, formats, stablehlo
from capvl.data.randomness import Uniforms
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.inference.detecting import Seen, buckets
from capvl.inference.face import LoadedModel
from capvl.models.glip import GlipOptions
from capvl.models.parameters import Blueprint
from capvl.weights import Weights


@pytest.mark.parametrize("name", ["lit", "captioner", "git"])
def test_stablehlo_takes_any_batch(name, tmp_path):
    weights = weights_of(name)
    model = Blueprint(weights.options).bind(jax.device_put(weights.params))
    embed = jax.jit(model.embed_image if name == "lit" else model.features)
    written = stablehlo.export(str(tmp_path / "model.stablehlo"), weights)
    assert len(written) == (2 if name == "lit" else 1)
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        shape = weights.options.image_shape() if name == "git" else (24, 24, 3)
        image = rng.integers(0, 256, (batch, *shape), np.uint8)
        exported = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
        expected = embed(jnp.asarray(image.astype(np.float32) / 127.5 - 1))
        assert_close(exported.call(image), expected, 1e-5)
        if name == "lit":
            text = rng.integers(0, 30, (batch, 8)).astype(np.int32)
            exported = jax.export.deserialize(bytearray((tmp_path / "model.text.stablehlo").read_bytes()))
            assert_close(exported.call(text), jax.jit(model.embed_text)(jnp.asarray(text)), 1e-5)


def test_a_detector_finds_what_the_model_finds(tmp_path, monkeypatch):
    """From pixels to boxes, in both shapes of images, for a list of classes that several texts have: what lies around
    an image is not seen."""
    words = tokenizer(tmp_path)
    monkeypatch.setattr(tokenizers, "load", lambda path, start=True: words)
    options = PointingOptions(length=7)
    params = {name: np.ones(shape.shape, np.float32) for name, shape in Blueprint(options).shapes.items()}
    weights = Weights(params, options, tokenizer="words", interpolation="bilinear")
    written = stablehlo.export(str(tmp_path / "found.stablehlo"), weights, tuple(NAMES))
    assert [pathlib.Path(file).name for file in written] == ["found.stablehlo", "found.tall.stablehlo"]
    model, rng = LoadedModel(weights, "pointing"), np.random.default_rng(0)
    for file, wide, batch in ((written[0], True, 3), (written[1], False, 1)):
        scenes = [scene(rng, wide)[0] for _ in range(batch)]
        call = jax.export.deserialize(bytearray(pathlib.Path(file).read_bytes())).call
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in scenes])
        sizes = np.tile(np.array(pixels.shape[1:3], np.int32), (batch, 1))
        boxes, scores, labels, valid = map(np.asarray, call(pixels, sizes))
        for i, expected in enumerate(model.detect(scenes, NAMES)):
            assert len(expected) >= 2 and valid[i].sum() == len(expected)
            assert_close(boxes[i, valid[i]], expected.boxes, 1e-6)
            assert_close(scores[i, valid[i]], expected.scores, 1e-6)
            assert [NAMES[label] for label in labels[i, valid[i]]] == expected.labels
            assert (labels[i, ~valid[i]] == -1).all()
        pixels[:, :, 40:] = rng.permutation(pixels[:, :, 40:], axis=2)
        hidden = np.array([[pixels.shape[1], 40]] * batch, np.int32)
        without = pixels.copy()
        without[:, :, 40:] = 0
        for found, expected in zip(call(pixels, hidden), call(without, hidden), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_glip_as_a_program(tmp_path):
    """The whole model by the command, with its pixels' normalisation; its BERT is not in the file."""
    weights = fresh_glip(tmp_path)
    names = ["red thing", "blue thing"]
    folder.write_folder(str(tmp_path / "ours"), weights)
    (tmp_path / "names.txt").write_text("\n".join(names))
    file = tmp_path / "glip.stablehlo"
    run("--from=capvl", "--to=stablehlo", tmp_path / "ours", file, f"--classes={tmp_path / 'names.txt'}")
    data = picture((200, 90, 30), (64, 48))
    model = LoadedModel(weights, "glip")
    expected = model.detect(data, names, threshold=0.3)
    table = weights.params["text/tokens"].tobytes()
    assert table not in file.read_bytes() and weights.params["head/project/kernel"].tobytes() in file.read_bytes()
    rows = Seen(model.crop.in_bucket(buckets(weights.options)[0]))({"image": data}, Uniforms(0, 0))
    call = jax.export.deserialize(bytearray(file.read_bytes())).call
    boxes, scores, labels, valid = map(np.asarray, call(rows["image"][None, ..., :3], rows["size"][None]))
    sure = valid[0] & (scores[0] > 0.3)
    assert sure.sum() == len(expected) > 5
    assert_close(scores[0, sure], expected.scores, 1e-5)
    assert_close(boxes[0, sure], expected.boxes, 1e-4)
    assert [names[label] for label in labels[0, sure]] == expected.labels


def fresh_glip(place):
    """A small GLIP as it begins, but that finds something everywhere."""
    tokenizer(place)
    options = GlipOptions(
        encoder="w8d1h1m8/8", pad_windows=False, level_norms=False, window=7, activation="gelu_tanh", eps=1e-6,
        pixels="clip", res=64, max_side=64, width=8, blocks=1, groups=2, fusion_width=8, fusion_heads=2,
        text="w8d1h1m8", vocab=32, length=10, text_positions=10, dtype="float32",
    )  # fmt: skip
    shapes, rng = Blueprint(options).shapes, np.random.default_rng(0)
    params = {n: 0.1 * rng.normal(size=s.shape).astype(np.float32) for n, s in shapes.items()}
    params |= {n: np.ones(s.shape, np.float32) for n, s in shapes.items() if n.endswith("scale")}
    return Weights(params, options, tokenizer=str(place / "vocab.txt"), interpolation="bilinear")


def test_what_a_detector_needs(tmp_path):
    words = dataclasses.replace(fresh_glip(tmp_path), tokenizer="")
    with pytest.raises(UserError, match="exported with what it looks for: give names, one a line, by --classes=FILE"):
        stablehlo.export(str(tmp_path / "a"), words)
    with pytest.raises(UserError, match="no tokenizer, which its classes need; give one by --tokenizer=FILE"):
        stablehlo.export(str(tmp_path / "a"), words, ("red thing",))
    with pytest.raises(UserError, match="--classes are what a detector looks for, and this model is none"):
        formats.write("stablehlo", str(tmp_path / "a"), weights_of("captioner"), classes=("red thing",))
    with pytest.raises(UserError, match="that is written by --to=stablehlo; leave them out"):
        formats.write("capvl", str(tmp_path / "a"), words, classes=("red thing",))
    assert not (tmp_path / "a").exists()
