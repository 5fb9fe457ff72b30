"""Random RoBERTas of transformers in PyTorch (CPU), in and out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from capvl.convert import __main__ as convert
from capvl.convert import folder, formats
from capvl.convert.load import load_parameters
from capvl.errors import UserError
from capvl.models.parameters import Blueprint
from capvl.models.two_towers import TwoTowersOptions
from capvl.models.xvlm import XVlmOptions
from capvl.nn.padding import real

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 2e-5
PAD = 1


def saved(cls, path, **changes):
    """A random model whose sizes are all different, and its folder."""
    sizes = dict(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, vocab_size=50,
        max_position_embeddings=16, type_vocab_size=1, pad_token_id=PAD, layer_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, cls)(transformers.RobertaConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.3)
    model.save_pretrained(path)
    return model


def texts():
    """(ours, theirs): texts that begin with id 0, with padding at their end."""
    ids = np.random.default_rng(0).integers(2, 50, (3, 9))
    ids[:, 0] = 0
    theirs = np.where(np.arange(9)[None] < np.array([[9], [5], [2]]), ids, PAD)
    return jnp.asarray(np.where(theirs == PAD, 0, theirs), jnp.int32), torch.tensor(theirs)


@pytest.mark.parametrize("cls, heads", [("RobertaModel", "pooler"), ("RobertaForMaskedLM", "words")])
def test_states_and_logits(cls, heads, tmp_path):
    """Of every position, padded ones too; and out again, with all arrays."""
    model = saved(cls, tmp_path / "theirs")
    weights = formats.read("huggingface", str(tmp_path / "theirs"))
    assert (weights.options.heads, weights.options.pad, weights.options.first_position) == (heads, PAD, PAD + 1)
    ours = Blueprint(weights.options).bind(jax.device_put(weights.params))
    text, ids = texts()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=(ids != PAD).long(), output_hidden_states=True)
    found = jax.jit(lambda t: ours(t, real(t)))(text)
    assert_close(found, out.hidden_states[-1].numpy(), TOLERANCE)
    if heads == "words":
        assert_close(jax.jit(ours.word_logits)(found), out.logits.numpy(), TOLERANCE)
    else:
        assert_close(jax.jit(ours.pool)(found), out.pooler_output.numpy(), TOLERANCE)
    convert.main(["--from=huggingface", "--to=capvl", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    convert.main(["--from=capvl", "--to=huggingface", str(tmp_path / "ours"), str(tmp_path / "out")])
    again, report = getattr(transformers, cls).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), value.numpy(), err_msg=name)


def test_a_roberta_for_another_task_and_without_pooler(tmp_path, capsys):
    saved("RobertaForSequenceClassification", tmp_path / "theirs")
    weights = formats.read("huggingface", str(tmp_path / "theirs"))
    assert weights.options.heads == "none" and "Left out" in capsys.readouterr().out


def test_what_is_refused(tmp_path):
    saved("RobertaModel", tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    for changes, words in (({"pad_token_id": 0}, "pad_token_id=0"), ({"is_decoder": True}, "is_decoder=True")):
        file.write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=words):
            formats.read("huggingface", str(tmp_path / "theirs"))


def test_an_x_vlm_begins_with_a_roberta_and_two_towers_dont(tmp_path):
    saved("RobertaForMaskedLM", tmp_path / "theirs")
    convert.main(["--from=huggingface", "--to=capvl", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    image = dict(encoder="w16d2h2m32/8", res=16)
    options = XVlmOptions(
        **image, text="w24d3h3m40", cross_layers=1, vocab=50, length=8, text_positions=16, text_types=1,
        text_pad=PAD, first_position=PAD + 1, text_eps=1e-5,
    )  # fmt: skip
    params = load_parameters(str(tmp_path / "ours"), options, ("text/(?!cross/cross).*",))
    weights = folder.read_model(str(tmp_path / "ours")).params
    np.testing.assert_array_equal(params["text/positions"], weights["positions"])
    with pytest.raises(UserError, match=r"model.text_pad=1 \(here 0\)"):
        load_parameters(str(tmp_path / "ours"), dataclasses.replace(options, text_pad=0), ("text/blocks/.*",))
    towers = TwoTowersOptions(**image, text="w24d3h3m40", vocab=50, length=8, text_norm="post", text_eps=1e-5)
    with pytest.raises(UserError, match="is a RoBERTa"):
        load_parameters(str(tmp_path / "ours"), towers, ("text/(?!head/).*",))
