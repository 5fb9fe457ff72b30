"""Swin in and out without PyTorch: round trips, tables at another resolution, what is refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden

from capvl.convert import formats, swin
from capvl.convert.files import write_safetensors
from capvl.convert.load import load_parameters
from capvl.errors import UserError
from capvl.models.captioner import CaptionerOptions
from capvl.models.encoder import EncoderOptions
from capvl.models.parameters import Blueprint
from capvl.nn.relative_positions import resize_offsets
from capvl.weights import Weights

OPTIONS = EncoderOptions(
    encoder="swin-w8d2-1h2-2/4", res=32, window=4, activation="gelu", eps=1e-5, pixels="imagenet", dtype="float32"
)


def weights_of(options=OPTIONS, seed=0):
    rng = np.random.default_rng(seed)
    shapes = Blueprint(options).shapes
    return Weights({n: rng.normal(size=s.shape).astype(np.float32) for n, s in shapes.items()}, options)


@pytest.mark.parametrize("framework", ["huggingface", "timm", "capvl"])
def test_there_and_back(framework, tmp_path):
    weights = weights_of()
    formats.write(framework, str(tmp_path / "out"), weights)
    again = formats.read(framework, str(tmp_path / "out"))
    assert again.options == weights.options and again.params.keys() == weights.params.keys()
    for name, value in weights.params.items():
        np.testing.assert_array_equal(again.params[name], value, err_msg=name)


@pytest.mark.golden
def test_original_names(tmp_path):
    """The golden state dict with the original's buffers and a classifier: its sizes are read from its shapes."""
    golden = load_golden("xvlm", "xvlm_swin.npz")
    state = {k.partition(".")[2]: v for k, v in golden.items() if k.startswith(("param.", "buffer."))}
    state["head.weight"] = np.zeros((3, 64), np.float32)
    write_safetensors(tmp_path / "swin.safetensors", state)
    weights = formats.read("swin", str(tmp_path / "swin.safetensors"))
    depths, heads = ("-".join(map(str, golden[f"cfg.{name}"])) for name in ("depths", "num_heads"))
    assert weights.options.encoder == f"swin-w{golden['cfg.embed_dim']}d{depths}h{heads}/4"
    assert (weights.options.res, weights.options.window) == (golden["cfg.image_res"], golden["cfg.window_size"])
    assert (weights.options.pixels, weights.crop_fraction) == ("imagenet", 0.875)
    back = swin.rules.write(weights.params, swin.original(len(golden["cfg.depths"])), "Swin")
    for name, value in back.items():
        np.testing.assert_array_equal(value, golden[f"param.{name}"], err_msg=name)
    assert len(back) == sum(k.startswith("param.") for k in golden)


def test_tables_are_resized_to_the_models_windows(tmp_path):
    """Also where only the last stage's window is another, because the stage is larger; the others stay as they are."""
    weights = weights_of(dataclasses.replace(OPTIONS, res=24, window=3))
    formats.write("capvl", str(tmp_path / "ours"), weights)
    model = CaptionerOptions(**dataclasses.asdict(OPTIONS), decoder_layers=1, vocab=30, length=8)
    loaded = load_parameters(str(tmp_path / "ours"), model, ("encoder/.*",))
    for name, value in weights.params.items():
        if name.endswith("/offsets"):
            expected = [resize_offsets(table, (3, 3), (4, 4)) for table in value]
            np.testing.assert_array_equal(loaded[name], expected)
        else:
            np.testing.assert_array_equal(loaded[name], value)
    larger = dataclasses.replace(model, res=48, window=6)
    assert load_parameters(str(tmp_path / "ours"), larger, ("encoder/.*",))["encoder/stages/1/offsets"].shape[1] == 121


WRONG = [
    ("huggingface", dict(eps=1e-6), "model.eps=1e-05; this model has 1e-06"),
    ("huggingface", dict(pool="map"), "model.pool='mean'; this model has 'map'"),
    ("huggingface", dict(res=16, window=4), r"one window for all stages; this model has \[4, 2\]"),
    ("timm", dict(activation="gelu_tanh"), "model.activation='gelu'"),
    ("big_vision", {}, "A big_vision model has a ViT; this model has model.encoder='swin-w8d2-1h2-2/4'"),
]


@pytest.mark.parametrize("framework, changes, sentence", WRONG)
def test_what_others_do_not_have(framework, changes, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        formats.write(framework, str(tmp_path / "out"), weights_of(dataclasses.replace(OPTIONS, **changes)))


CONFIGS = [
    (dict(use_absolute_embeddings=True), "use_absolute_embeddings=True"),
    (dict(mlp_ratio=2.0), "mlp_ratio=2.0"),
    (dict(layer_norm_eps=1e-6), "layer_norm_eps=1e-06"),
    (dict(image_size=16), r"tables are of windows \[4, 4\], and at 16 pixels they should be of \[4, 2\]"),
    (dict(hidden_act="relu"), "activation 'relu'"),
]


@pytest.mark.parametrize("changes, sentence", CONFIGS)
def test_configurations_that_are_refused(changes, sentence, tmp_path):
    formats.write("huggingface", str(tmp_path / "out"), weights_of())
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=sentence):
        formats.read("huggingface", str(tmp_path / "out"))


def test_other_arrays_are_refused():
    weights = weights_of()
    state = swin.rules.write(weights.params, swin.original(2), "Swin")
    with pytest.raises(UserError, match=r"lack 'layers.0.blocks.0.attn.relative_position_bias_table'"):
        swin.read_original({"patch_embed.proj.weight": state["patch_embed.proj.weight"]})
    with pytest.raises(UserError, match="1 arrays that a Swin does not have: absolute_pos_embed"):
        swin.read_original(state | {"absolute_pos_embed": np.zeros((1, 64, 8), np.float32)})
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(UserError, match="48 offsets is not that of a square window"):
        swin.read_original(state | {table: state[table][:48]})
    assert jnp.isfinite(state[table]).all()
