"""Exported models give the same numbers in PyTorch (CPU): transformers, timm; positions as torch resizes them."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from pytorch import timm
from test_convert import weights_of

from capvl.convert import formats
from capvl.errors import UserError
from capvl.models.parameters import Blueprint
from capvl.nn.positions import resize

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 1e-5


def ours(name):
    weights = weights_of(name)
    model = Blueprint(weights.options).bind(jax.device_put(weights.params))
    return weights, model


def images(model):
    """The same pixels for us, normalised as the model wants them, and for torch."""
    image = np.random.default_rng(0).uniform(-1, 1, (3, 24, 24, 3)).astype(np.float32)
    pixels = np.asarray(model.encoder.normalize(jnp.asarray(image)))
    return jnp.asarray(image), torch.tensor(pixels.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["encoder", "map encoder", "captioner"])
def test_siglip_vision_model(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    weights, model = ours(name)
    formats.write("huggingface", str(tmp_path / "out"), weights)
    theirs, report = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    image, pixels = images(model)
    with torch.no_grad():
        found = theirs(pixel_values=pixels)
    assert_close(found.last_hidden_state, jax.jit(model.encode)(image), TOLERANCE)
    if name == "map encoder":
        assert_close(found.pooler_output, jax.jit(model.features)(image), TOLERANCE)


@pytest.mark.parametrize("name, kind", [("lit", "SiglipModel"), ("clip", "CLIPModel")])
def test_two_towers(name, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    weights, model = ours(name)
    formats.write("huggingface", str(tmp_path / "out"), weights)
    theirs, report = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    image, pixels = images(model)
    text = np.random.default_rng(1).integers(1, 30, (3, 8))
    text[:, -1] = 29

    @jax.jit
    def logits(image, text):
        dots = model.scale() * model.embed_image(image) @ model.embed_text(text).T
        return dots + (model.offset() if name == "lit" else 0.0)

    with torch.no_grad():
        found = theirs(pixel_values=pixels, input_ids=torch.tensor(text)).logits_per_image
    assert_close(found, logits(image, jnp.asarray(text, jnp.int32)), 1e-4)


@pytest.mark.parametrize("name", ["git", "untied git"])
def test_git(name, tmp_path):
    """Logits of text behind images and clips, and what both write greedily and in beams."""
    transformers = pytest.importorskip("transformers")
    from capvl.decoding.generate import Decoding, generate

    weights, model = ours(name)
    formats.write("huggingface", str(tmp_path / "out"), weights)
    theirs, report = transformers.GitForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs.eval()
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (3, 2, 24, 24, 3)).astype(np.float32)
    text = rng.integers(3, 30, (3, 6)).astype(np.int32)
    pixels = np.asarray(model.encoder.normalize(jnp.asarray(image.reshape(6, 24, 24, 3)))).reshape(image.shape)
    pixels = torch.tensor(pixels.transpose(0, 1, 4, 2, 3))
    start = weights.options.start
    ids = torch.tensor(np.concatenate([np.full((3, 1), start), text[:, :-1]], axis=1), dtype=torch.long)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits[:, -6:]
        longer = dict(max_new_tokens=6, eos_token_id=2, pad_token_id=0, do_sample=False, bos_token_id=start)
        first = torch.full((3, 1), start)
        greedy, beams = (
            theirs.generate(input_ids=first, pixel_values=pixels, num_beams=n, length_penalty=0.6, **longer)
            for n in (1, 3)
        )
    logits = jax.jit(model.logits)(jnp.asarray(image), jnp.asarray(text))
    assert_close(logits, expected.numpy(), TOLERANCE)
    for decoding, ids in ((Decoding(), greedy), (Decoding(beams=3, length_penalty=0.6), beams)):
        kv = model.decoder.image_kv(model.encode(jnp.asarray(image)))
        written = np.asarray(generate(model, kv, 6, 2, decoding)[0])
        for row, expected in zip(written.tolist(), ids[:, 1:].tolist(), strict=True):
            end = expected.index(2) + 1 if 2 in expected else len(expected)
            assert row[:end] == expected[:end] and not any(row[end:])


@pytest.mark.parametrize("tie", [None, False, True])
def test_a_git_of_transformers(tie, tmp_path):
    """What transformers makes and saves is read, gives its logits and texts, and goes back as it was."""
    transformers = pytest.importorskip("transformers")
    from capvl.decoding.generate import Decoding, generate

    sizes = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, hidden_size=16)
    says = {} if tie is None else {"tie_word_embeddings": tie}
    config = transformers.GitConfig(
        vision_config=dict(**sizes, image_size=24, patch_size=8), vocab_size=30, max_position_embeddings=12,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes, **says,
    )  # fmt: skip
    theirs = transformers.GitForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    weights = formats.read("huggingface", str(tmp_path / "theirs"))
    assert weights.options.tied == bool(tie)
    model = Blueprint(weights.options).bind(jax.device_put(weights.params))
    image, pixels = images(model)
    text = np.random.default_rng(0).integers(3, 30, (3, 6)).astype(np.int32)
    ids = torch.tensor(np.concatenate([np.full((3, 1), 1), text[:, :-1]], axis=1), dtype=torch.long)
    formats.write("huggingface", str(tmp_path / "again"), weights)
    again, report = transformers.GitForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.config.tie_word_embeddings == bool(tie)
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    longer = dict(max_new_tokens=6, eos_token_id=2, pad_token_id=0, do_sample=False)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits[:, -6:]
        greedy = theirs.generate(input_ids=ids[:, :1], pixel_values=pixels, **longer)[:, 1:].tolist()
    assert_close(jax.jit(model.logits)(image, jnp.asarray(text)), expected.numpy(), TOLERANCE)
    kv = model.decoder.image_kv(model.encode(image))
    written = np.asarray(generate(model, kv, 6, 2, Decoding())[0]).tolist()
    for row, own in zip(written, greedy, strict=True):
        end = own.index(2) + 1 if 2 in own else len(own)
        assert row[:end] == own[:end]


def test_bert_for_pre_training(tmp_path):
    transformers = pytest.importorskip("transformers")
    weights, model = ours("bert")
    formats.write("huggingface", str(tmp_path / "out"), weights)
    theirs, report = transformers.BertForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["unexpected_keys"]
    text = np.random.default_rng(1).integers(1, 30, (3, 8))
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor(text)).prediction_logits
    words = jnp.asarray(text, jnp.int32)
    assert_close(found, jax.jit(lambda t: model.word_logits(model(t, t > 0)))(words), 1e-4)


@pytest.mark.parametrize("name", ["encoder", "map encoder", "class token", "captioner"])
def test_timm(timm, name, tmp_path):
    weights, model = ours(name)
    formats.write("timm", str(tmp_path / "out"), weights)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    image, pixels = images(model)
    with torch.no_grad():
        found = theirs(pixels)
    assert_close(found, jax.jit(model.features)(image), TOLERANCE)


@pytest.mark.parametrize("rule, antialias", [("hugging_face", False), ("timm", True)])
@pytest.mark.parametrize("new", [(5, 7), (3, 9), (4, 2)])
def test_positions_are_resized_as_torch_does(rule, antialias, new):
    table = np.random.default_rng(0).normal(size=(36, 4)).astype(np.float32)
    grid = torch.tensor(table.reshape(1, 6, 6, 4).transpose(0, 3, 1, 2))
    found = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", antialias=antialias, align_corners=False)
    assert_close(resize(table, (6, 6), new, rule), found[0].permute(1, 2, 0).reshape(-1, 4), 1e-5)


def test_a_pickle_is_read_as_weights_only_when_asked_for(tmp_path):
    from capvl.convert import files

    torch.save({"state_dict": {"module.a": torch.arange(3.0)}}, tmp_path / "good.pt")
    arrays, _ = files.read_weights(str(tmp_path / "good.pt"), allow_pickle=True)
    np.testing.assert_array_equal(arrays["a"], [0, 1, 2])
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match="can't be read as weights only"):
        files.read_weights(str(tmp_path / "bad.pt"), allow_pickle=True)
