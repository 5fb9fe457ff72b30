"""timm's and transformers' Swins give the same numbers in PyTorch, in and out, with random weights."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from pytorch import timm
from test_convert_swin import OPTIONS, weights_of
from test_torch_timm import arrays, randomised

from capvl.bench import encoder
from capvl.convert import formats, rules, swin
from capvl.convert.files import write_safetensors
from capvl.errors import UserError
from capvl.models.parameters import Blueprint

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 2e-5
NAME = "swin_tiny_patch4_window7_224"
SMALL = dict(img_size=32, patch_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=4)


def both(weights, side=32):
    """(our levels, our features, the same pixels for torch)."""
    model = Blueprint(weights.options).bind(jax.device_put(weights.params))
    image = np.random.default_rng(0).uniform(-1, 1, (3, side, side, 3)).astype(np.float32)
    pixels = np.asarray(model.encoder.normalize(jnp.asarray(image))).transpose(0, 3, 1, 2)
    levels = jax.jit(lambda x: model.encoder.levels(model.encoder.normalize(x)))(image)
    return levels, jax.jit(model.features)(image), torch.tensor(pixels)


@pytest.mark.parametrize("changes", [{}, {"window_size": 8}, {"qkv_bias": False}, {"img_size": 64}], ids=str)
def test_a_swin_of_timm(changes, timm, tmp_path):
    """Stages and features; a stage that is one window; and out again."""
    side = changes.get("img_size", 32)
    arguments = SMALL | dict(num_classes=0) | changes
    model = randomised(timm.create_model(NAME, **arguments))
    write_safetensors(tmp_path / "model.safetensors", arrays(model))
    pretrained = {"input_size": [3, side, side], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": NAME, "global_pool": "avg", "model_args": arguments, "pretrained_cfg": pretrained}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = formats.read("timm", str(tmp_path))
    levels, features, pixels = both(weights, side)
    with torch.no_grad():
        _, theirs = model.forward_intermediates(pixels)
        assert_close(features, model(pixels), TOLERANCE)
        assert_close(levels[-1].map(), model.forward_features(pixels), TOLERANCE)
    assert_close(levels[0].map(), theirs[0].permute(0, 2, 3, 1), TOLERANCE)
    formats.write("timm", str(tmp_path / "out"), weights)
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert_close(again(pixels), features, TOLERANCE)


def test_timm_and_the_original_name_merging_differently(timm, tmp_path):
    """timm reads the original's names; so do we, and both give the same."""
    weights = weights_of()
    original = rules.write(weights.params, swin.original(2), "Swin")
    write_safetensors(tmp_path / "model.safetensors", original)
    read = formats.read("swin", str(tmp_path / "model.safetensors"))
    model = timm.create_model(NAME, **SMALL, num_classes=0).eval()
    filtered = timm.models.swin_transformer.checkpoint_filter_fn(
        {k: torch.tensor(v) for k, v in original.items()}, model
    )
    model.load_state_dict(filtered)
    _, features, pixels = both(read)
    with torch.no_grad():
        assert_close(features, model(pixels), TOLERANCE)


@pytest.mark.parametrize("kind", ["SwinModel", "SwinForImageClassification"])
def test_a_swin_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4)
    model = randomised(getattr(transformers, kind)(transformers.SwinConfig(**sizes)))
    model.save_pretrained(tmp_path / "theirs")
    weights = formats.read("huggingface", str(tmp_path / "theirs"))
    levels, features, pixels = both(weights)
    with torch.no_grad():
        found = (model if kind == "SwinModel" else model.swin)(pixels)
    assert_close(levels[-1].tokens_BND, found.last_hidden_state, TOLERANCE)
    assert_close(features, found.pooler_output, TOLERANCE)
    # transformers' names in memory and on the hub differ.
    in_memory = tmp_path / "in_memory"
    in_memory.mkdir()
    shutil.copy(tmp_path / "theirs/config.json", in_memory)
    write_safetensors(in_memory / "model.safetensors", arrays(model))
    for name, value in formats.read("huggingface", str(in_memory)).params.items():
        np.testing.assert_array_equal(value, weights.params[name], err_msg=name)


def test_out_to_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    weights = dataclasses.replace(weights_of(), resize="hugging_face")
    assert weights.options == OPTIONS
    formats.write("huggingface", str(tmp_path / "out"), weights)
    model, report = transformers.SwinModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    levels, features, pixels = both(weights)
    with torch.no_grad():
        found = model.eval()(pixels)
    assert_close(levels[-1].tokens_BND, found.last_hidden_state, TOLERANCE)
    assert_close(features, found.pooler_output, TOLERANCE)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ["swin-w8d2-1h2-2/4", "w16d2h2m32/8"])
def test_the_benchmark_runs_the_same_model_in_both(name, timm, capsys, monkeypatch):
    monkeypatch.setattr(encoder, "matmul_rate", lambda: 1e9)
    arguments = [f"--encoder={name}", "--batch=2", "--rounds=1", "--res=32", "--against=timm"]
    arguments += ["--window=4"] if name.startswith("swin") else []
    encoder.main(arguments)
    assert "speed_of_ours_by_theirs" in capsys.readouterr().out
    theirs = encoder.theirs
    monkeypatch.setattr(encoder, "theirs", lambda *a: lambda: 1.1 * theirs(*a)())
    with pytest.raises(UserError, match="timm gives other features for the same weights, off by 0.09"):
        encoder.main(arguments)
