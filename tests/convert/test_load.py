"""What a model begins with: other kinds of weights, resized positions, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from test_convert import MODELS, random_params, weights_of

from capvl.convert import folder
from capvl.convert.load import load_parameters
from capvl.errors import UserError
from capvl.models.encoder import EncoderOptions
from capvl.models.parameters import Blueprint
from capvl.models.two_towers import TwoTowersOptions
from capvl.models.xvlm import XVlmOptions
from capvl.nn.positions import resize, resize_grid
from capvl.objectives.judge import ASSIGNED
from capvl.weights import Weights


def test_an_untied_git_begins_with_a_tied_one_or_a_bert(tmp_path):
    """Its own output layer is then a copy of the table; a tied one can't begin with an untied one."""
    for name in ("git", "bert", "untied git"):
        folder.write_folder(str(tmp_path / name), weights_of(name))
    params = load_parameters(str(tmp_path / "git"), MODELS["untied git"])
    tied = weights_of("git").params
    np.testing.assert_array_equal(params["decoder/logits/kernel"], tied["decoder/tokens"].T)
    np.testing.assert_array_equal(params["decoder/logits/bias"], tied["decoder/bias"])
    bert = load_parameters(str(tmp_path / "bert"), MODELS["untied git"], ("decoder/(?!visual).*",))
    np.testing.assert_array_equal(bert["decoder/logits/kernel"], weights_of("bert").params["tokens"].T)
    np.testing.assert_array_equal(bert["decoder/logits/bias"], weights_of("bert").params["word_bias"])
    with pytest.raises(UserError, match="decoder/(bias|logits)"):
        load_parameters(str(tmp_path / "untied git"), MODELS["git"])


def test_a_git_begins_with_a_clip_and_a_bert(tmp_path):
    """The encoder of one folder, the decoder of another; BERT's first layers and positions, segment 0 in them."""
    for name in ("clip", "bert"):
        folder.write_folder(str(tmp_path / name), weights_of(name))
    options = dataclasses.replace(MODELS["git"], text="w16d1h2m32", frames=0, text_positions=8)
    only = ("(encoder|decoder/(?!visual)).*",)
    params = load_parameters(f"{tmp_path / 'clip'} + {tmp_path / 'bert'}", options, only)
    bert, clip = (weights_of(name).params for name in ("bert", "clip"))
    np.testing.assert_array_equal(params["encoder/blocks/mlp/up/kernel"], clip["encoder/blocks/mlp/up/kernel"])
    np.testing.assert_array_equal(params["decoder/blocks/attn/qkv/kernel"], bert["blocks/attn/qkv/kernel"][:1])
    np.testing.assert_array_equal(params["decoder/positions"], bert["positions"] + bert["types"][:1])
    assert set(Blueprint(options).shapes) - set(params) == {
        f"decoder/{n}" for n in ("visual/kernel", "visual/bias", "visual_norm/scale", "visual_norm/bias")
    }
    with pytest.raises(UserError, match="has 2 layers and 8 positions"):
        load_parameters(str(tmp_path / "bert"), dataclasses.replace(options, text_positions=9), ("decoder/.*",))


@pytest.mark.parametrize(
    "name, change, words",
    [
        (
            "clip",
            {"activation": "gelu"},
            r"under encoder/ were trained with model.activation='quick_gelu' \(here 'gelu'",
        ),
        ("clip", {"eps": 1e-6}, r"under encoder/ were trained with model.eps=1e-05 \(here 1e-06\)"),
        ("clip", {"text_causal": False}, r"under text/ were trained with model.text_causal=True"),
        ("git", {"text_eps": 1e-5}, r"under decoder/ were trained with model.text_eps=1e-12 \(here 1e-05\)"),
    ],
)
def test_parameters_that_would_compute_something_else(tmp_path, name, change, words):
    """No shape tells which activation, eps or pixels a tower was trained with."""
    folder.write_folder(str(tmp_path / name), weights_of(name))
    options = MODELS[name]
    load_parameters(str(tmp_path / name), options)
    with pytest.raises(UserError, match=words):
        load_parameters(str(tmp_path / name), dataclasses.replace(options, **change))
    if "under text/" in words:
        only = ("encoder/.*",)
        assert load_parameters(str(tmp_path / name), dataclasses.replace(options, **change), only)


@pytest.mark.parametrize("pixels, into", [("clip", "half"), ("imagenet", "clip"), ("half", "imagenet")])
def test_an_encoder_that_sees_other_pixels_computes_the_same(tmp_path, pixels, into):
    """Their normalisation becomes part of the patches' embedding; convolutions with padding have no place for it."""
    options = dataclasses.replace(MODELS["class token"], pixels=pixels)
    params = random_params(options)
    folder.write_folder(str(tmp_path / "ours"), Weights(params, options))
    other = dataclasses.replace(options, pixels=into)
    loaded = load_parameters(str(tmp_path / "ours"), other)
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, options.res, options.res, 3)), jnp.float32)
    outputs = [
        jax.jit(lambda p, o=o: Blueprint(o).bind(p).features(image))(p)
        for o, p in ((options, params), (other, loaded), (other, params))
    ]
    assert_close(outputs[1], outputs[0], 2e-5)
    assert np.abs(outputs[2] - outputs[0]).max() > 1e-2
    conv = dataclasses.replace(options, stem="conv")
    folder.write_folder(str(tmp_path / "conv"), Weights(random_params(conv), conv))
    with pytest.raises(UserError, match=f"model.pixels='{pixels}' .here '{into}'"):
        load_parameters(str(tmp_path / "conv"), dataclasses.replace(conv, pixels=into))


def test_an_x_vlm_begins_with_a_swin_and_a_bert(tmp_path):
    """Tables of a Swin become those of larger windows, near offsets as they were."""
    image = dict(encoder="swin-w8d2-1h2-2/4", activation="gelu", eps=1e-5, dtype="float32")
    small = EncoderOptions(**image, res=32, window=4, pixels="imagenet")
    folder.write_folder(str(tmp_path / "swin"), Weights(random_params(small), small))
    folder.write_folder(str(tmp_path / "bert"), weights_of("bert"))
    options = XVlmOptions(
        **image, res=48, window=6, pixels="clip", text="w16d2h2m32", cross_layers=1, vocab=30, length=8,
        text_positions=8,
    )  # fmt: skip
    path, only = f"{tmp_path / 'swin'} + {tmp_path / 'bert'}", ("encoder/.*", "text/(?!cross/cross).*")
    params = load_parameters(path, options, only)
    left = set(Blueprint(options).shapes) - set(params)
    assert left and all(
        name.startswith(("image_head", "text_head", "temp", "itm", "box", "text/cross/c")) for name in left
    )
    tables, theirs = params["encoder/stages/0/offsets"], random_params(small)["encoder/stages/0/offsets"]
    assert (tables.shape, theirs.shape) == ((2, 121, 2), (2, 49, 2))
    assert_close(tables[:, 60], theirs[:, 24], 1e-5)
    with pytest.raises(UserError, match="encoder/stages/0/blocks/attn/out/bias is only in the model"):
        load_parameters(str(tmp_path / "bert"), options, only)


def test_models_of_tasks_begin_with_an_x_vlm(tmp_path):
    """Its encoders, each cross-modal layer twice for two images; decoders begin as its cross-modal layers."""
    folder.write_folder(str(tmp_path / "xvlm"), weights_of("xvlm"))
    theirs = weights_of("xvlm").params

    def begin(name, only, **changes):
        options = dataclasses.replace(MODELS[name], **changes)
        params = load_parameters(str(tmp_path / "xvlm"), options, only)
        return params, set(Blueprint(options).shapes) - set(params)

    judge, left = begin("judge", ("(encoder|text)/.*",))
    assert {name.split("/")[0] for name in left} == {"head"}
    for part in ("first", "second"):
        np.testing.assert_array_equal(judge[f"text/cross/{part}/mlp/up/kernel"], theirs["text/cross/mlp/up/kernel"])
    captioner, left = begin("xvlm captioner", ())
    assert not left
    np.testing.assert_array_equal(captioner["text/word_bias"], theirs["text/word_bias"])
    answers, left = begin("xvlm answers", (), answer_layers=1)
    assert not left
    np.testing.assert_array_equal(answers["answers/cross/mlp/up/kernel"], theirs["text/cross/mlp/up/kernel"])
    with pytest.raises(UserError, match="1 cross-modal layers, fewer than model.answer_layers=2"):
        begin("xvlm answers", ())
    assigned = dataclasses.replace(MODELS["judge"], classes=ASSIGNED, head="linear", projection=4)
    folder.write_folder(str(tmp_path / "assigned"), Weights(random_params(assigned), assigned))
    params = load_parameters(str(tmp_path / "assigned"), MODELS["judge"], ("(encoder|text)/.*",))
    np.testing.assert_array_equal(
        params["text/cross/second/norm1/scale"], random_params(assigned)["text/cross/second/norm1/scale"]
    )


def test_init_from_a_converted_folder_resizes_positions(tmp_path):
    folder.write_folder(str(tmp_path / "ours"), Weights(random_params(MODELS["lit"]), MODELS["lit"], "timm"))
    larger = TwoTowersOptions(**(vars(MODELS["lit"]) | {"res": 48}))
    params = load_parameters(str(tmp_path / "ours"), larger, ("encoder/.*",))
    assert params["encoder/positions"].shape == (36, 16)
    assert all(name.startswith("encoder/") for name in params)
    with pytest.raises(UserError, match="matches no parameter"):
        load_parameters(str(tmp_path / "ours"), larger, ("encodr/.*",))


@pytest.mark.parametrize("rule", ["big_vision", "hugging_face", "timm"])
def test_resizing_keeps_constants_and_the_class_position(rule):
    constant = np.full((9, 3), 2.5, np.float32)
    assert_close(resize(constant, (3, 3), (5, 7), rule), np.full((35, 3), 2.5), 1e-6)
    table = np.concatenate([[[7.0, 8.0]], np.random.default_rng(0).normal(size=(16, 2))]).astype(np.float32)
    resized = resize_grid(table, 10, rule, first=1)
    assert resized.shape == (10, 2)
    np.testing.assert_array_equal(resized[0], table[0])


@pytest.mark.parametrize("depth, upper", [(3, [2]), (4, [3])])
def test_an_x_vlm_begins_with_a_clip_and_a_bert(tmp_path, depth, upper):
    """Upper layers are those of the BERT, or of one with twice as many every second; cross-attention is fresh."""
    bert = dataclasses.replace(MODELS["bert"], text=f"w16d{depth}h2m32", length=12)
    options = dataclasses.replace(MODELS["xvlm"], text="w16d3h2m32", text_positions=10)
    folder.write_folder(str(tmp_path / "clip"), weights_of("clip"))
    folder.write_folder(str(tmp_path / "bert"), Weights(random_params(bert), bert))
    path, only = f"{tmp_path / 'clip'} + {tmp_path / 'bert'}", ("encoder/.*", "text/(?!cross/cross).*")
    params = load_parameters(path, options, only)
    theirs = random_params(bert)
    assert set(Blueprint(options).shapes) - set(params) == {
        name for name in Blueprint(options).shapes if not name.startswith(("encoder/", "text/"))
    } | {name for name in Blueprint(options).shapes if name.startswith("text/cross/cross")}
    kernel = theirs["blocks/attn/qkv/kernel"]
    np.testing.assert_array_equal(params["text/blocks/attn/qkv/kernel"], kernel[:2])
    np.testing.assert_array_equal(params["text/cross/attn/qkv/kernel"], kernel[upper])
    np.testing.assert_array_equal(params["text/positions"], theirs["positions"][:10])
    for name in ("types", "transform/kernel", "word_bias", "norm/scale"):
        np.testing.assert_array_equal(params[f"text/{name}"], theirs[name])
    np.testing.assert_array_equal(params["encoder/cls"], weights_of("clip").params["encoder/cls"])
    refused = {
        "text_eps": 1e-5, "text_activation": "gelu_tanh", "vocab": 31, "text_types": 1, "text_positions": 13,
        "first_position": 1, "text": "w16d3h1m32",
    }  # fmt: skip
    for name, value in refused.items():
        with pytest.raises(UserError, match=f"makes texts' encoders of .*model.{name}="):
            load_parameters(path, dataclasses.replace(options, **{name: value}), only)
    with pytest.raises(UserError, match=rf"has {depth} layers; .* begins with one of 6 or 7"):
        load_parameters(path, dataclasses.replace(options, text="w16d6h2m32"), only)


def test_an_x_vlm_begins_with_one_that_has_more_heads(tmp_path):
    folder.write_folder(str(tmp_path / "whole"), weights_of("xvlm"))
    for heads in (("itm",), ("itc", "mlm"), ("box",)):
        options = dataclasses.replace(MODELS["xvlm"], heads=heads)
        params = load_parameters(str(tmp_path / "whole"), options)
        assert params.keys() == Blueprint(options).shapes.keys()
    folder.write_folder(str(tmp_path / "box"), Weights(random_params(options), options))
    with pytest.raises(UserError, match="itm/down/bias is only in the model"):
        load_parameters(str(tmp_path / "box"), dataclasses.replace(options, heads=("box", "itm")))
