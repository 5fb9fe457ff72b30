"""Texts become the ids that transformers' tokenizers make of them; whole models say the same of photos and texts."""

import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import assert_close, real_data
from pytorch import opened, photos

import capvl
from capvl.convert import __main__ as convert
from capvl.convert import formats, tokens
from capvl.data.text import tokenizers
from capvl.errors import UserError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore"), pytest.mark.realdata]
TEXTS = [
    "A dog runs on the beach.", "Two children, one in RED - play (chess)!", "it's   3.5 km\tto\nPrague_city", "",
    "Café ÑANDÚ naïve", "under_score semi;colon \"quoted\"", "a photo of a cat " * 20,
]  # fmt: skip
SPIECE = ("tokenizers", "cc_all.32000.100extra.sentencepiece.model")


def ids(tokenizer, texts, length, pad=0):
    """Ids as the model reads them: with its padding behind the end."""
    from capvl.nn import padding

    rows = np.stack([tokenizer(text, length) for text in texts])
    return np.where(padding.real(rows), rows, pad)


def siglip_tokenizer(folder, **arguments):
    """The files of a SigLIP tokenizer, and transformers'."""
    pytest.importorskip("google.protobuf")
    theirs = transformers.SiglipTokenizer(real_data(*SPIECE), **arguments)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("arguments", [{}, {"do_lower_case": False}, {"pad_token": "<pad>"}])
def test_siglip(arguments, tmp_path):
    """Small letters, no punctuation, filled up with what its files say."""
    theirs = siglip_tokenizer(tmp_path, **arguments)
    (tmp_path / "tokenizer.json").write_text("{}")  # What others made of it isn't read.
    file = tokens.find(str(tmp_path))
    assert file.endswith("spiece.model")
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(ids(tokenizers.load(file), TEXTS, 16, tokens.padding(file)), expected)
    assert tokens.padding(file) == theirs.pad_token_id
    copied = tmp_path / "copy"
    copied.mkdir()
    name = tokens.copy(file, copied, "tokenizer.model")
    np.testing.assert_array_equal(
        ids(tokenizers.load(str(copied / name)), TEXTS, 16), ids(tokenizers.load(file), TEXTS, 16)
    )


@pytest.mark.parametrize("ends", [{"add_eos_token": True}, {"add_eos_token": True, "add_bos_token": True}])
def test_siglip_2(ends, tmp_path):
    """Gemma's pieces, of small letters by the tokenizer's class alone; the padding that its settings name."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyzADTR.,!", "▁a", "do", "dog"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, *(f"<0x{i:02X}>" for i in range(256))]
    merges = [("▁", "a"), ("d", "o"), ("do", "g")]
    theirs = transformers.Siglip2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, padding_side="right", **ends
    )
    theirs.save_pretrained(tmp_path)
    file = tokens.find(str(tmp_path))
    bare = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    bare["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    pathlib.Path(file).write_text(json.dumps(bare), encoding="utf-8")
    theirs = transformers.Siglip2Tokenizer.from_pretrained(tmp_path)
    texts = ["A dog runs.", "a DOG! and a, d", "ä"]
    expected = theirs(texts, padding="max_length", max_length=24, return_tensors="np")["input_ids"]
    tokenizer = tokenizers.SubwordTokenizer(file)
    np.testing.assert_array_equal(ids(tokenizer, texts, 24, tokens.padding(file)), expected)
    assert (tokens.padding(file), tokenizer.eos) == (0, 1)


def test_padding_in_front_is_refused(tmp_path):
    siglip_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    with pytest.raises(UserError, match="fills texts up on the left"):
        tokens.padding(str(tmp_path / "spiece.model"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<none>"}))
    with pytest.raises(UserError, match="'<none>' is no piece"):
        tokens.padding(str(tmp_path / "spiece.model"))


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("accents", [None, True, False])
def test_bert_with_and_without_case(lower, accents, tmp_path):
    words = pathlib.Path(real_data("tokenizers", "bert-base-uncased-vocab.txt")).read_text(encoding="utf-8")
    vocabulary = words + "A\nTwo\nRED\nCaf\nCafé\n##é\nÑANDÚ\n"
    (tmp_path / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    settings = {"do_lower_case": lower, "strip_accents": accents, "tokenizer_class": "BertTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(ids(tokenizers.load(tokens.find(str(tmp_path))), TEXTS, 16), expected)


def clip_files(folder):
    """vocab.json and merges.txt of CLIP, and transformers' tokenizer of them."""
    import gzip

    ours = tokenizers.load(real_data("tokenizers", "bpe_simple_vocab_16e6.txt.gz"))
    (folder / "vocab.json").write_text(json.dumps(ours._model.get_vocab()), encoding="utf-8")
    with gzip.open(ours.path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]), encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def test_clip_from_vocab_and_merges(tmp_path):
    theirs = clip_files(tmp_path)
    file = tokens.find(str(tmp_path))
    assert file.endswith("vocab.json")
    texts = [*TEXTS, "wow!!! &amp; “quotes”"]
    for text in texts:
        expected = theirs(text, truncation=True, max_length=24)["input_ids"]
        assert list(tokenizers.load(file)(text, 24)[: len(expected)]) == expected
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="as CLIP's"):
        tokenizers.SubwordTokenizer(file)
    (tmp_path / "merges.txt").unlink()
    assert tokens.find(str(tmp_path)) == ""


SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)


def random_model(cls, config):
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim:
                value.normal_(std=0.2)
                value += 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return model


KINDS = [
    ("clip", "gelu", 1e-3),
    ("clip", "quick_gelu", 1e-5),
    ("clip", "gelu_pytorch_tanh", 1e-5),
    ("siglip", "gelu", 1e-6),
    ("siglip", "gelu_pytorch_tanh", 1e-2),
]


@pytest.mark.parametrize("kind, text_act, text_eps", KINDS)
def test_two_towers_say_the_same_of_photos_and_texts(kind, text_act, text_eps, tmp_path):
    """From encoded photo and text to embeddings, with a text tower of another activation and eps than the image's."""
    vision = dict(**SIZES, image_size=32, patch_size=8)
    text = SIZES | dict(hidden_size=16, num_attention_heads=2, hidden_act=text_act, layer_norm_eps=text_eps)
    if kind == "clip":
        tokenizer = clip_files(tmp_path)
        ends = dict(vocab_size=49408, max_position_embeddings=20, eos_token_id=49407, bos_token_id=49406)
        config = transformers.CLIPConfig(vision_config=vision, text_config=text | ends, projection_dim=12)
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32})
        model = random_model("CLIPModel", config)
    else:
        tokenizer = siglip_tokenizer(tmp_path, **({"pad_token": "<pad>"} if text_act == "gelu" else {}))
        words = dict(vocab_size=len(tokenizer), max_position_embeddings=20, projection_size=24)
        config = transformers.SiglipConfig(vision_config=vision, text_config=text | words)
        processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
        model = random_model("SiglipModel", config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    convert.main(["--from=huggingface", "--to=capvl", str(tmp_path), str(tmp_path / "ours")])
    seen, texts = photos(6), ["A dog runs.", "two children, one in RED!", "a cat & a horse"]
    pixel_values = processor(images=[opened(p) for p in seen], return_tensors="pt")["pixel_values"]
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
    with torch.no_grad():
        found = model(pixel_values=pixel_values, input_ids=batch["input_ids"])
    ours = capvl.load(str(tmp_path / "ours"))
    assert (ours.options.text_activation or ours.options.activation) == convert_name(text_act)
    assert (ours.options.text_eps or ours.options.eps) == text_eps
    image, words = ours.embed(seen), ours.embed_text(texts)
    assert_close(image, found.image_embeds, 2e-5)
    assert_close(words, found.text_embeds, 2e-5)
    cosine = np.sum(words * found.text_embeds.numpy(), axis=1)
    assert cosine.min() > 1 - 1e-6
    # And out again, with files that transformers reads in the same way.
    convert.main(["--from=capvl", "--to=huggingface", str(tmp_path / "ours"), str(tmp_path / "out")])
    again = type(processor).from_pretrained(tmp_path / "out")
    same = again(images=[opened(p) for p in seen], return_tensors="pt")["pixel_values"]
    np.testing.assert_array_equal(same.numpy(), pixel_values.numpy())
    ids_again = type(tokenizer).from_pretrained(tmp_path / "out")(texts)["input_ids"]
    assert ids_again == tokenizer(texts)["input_ids"]


def convert_name(name):
    from capvl.convert.hugging_face import ACTIVATIONS

    return ACTIVATIONS[name]


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_vit_says_the_same_of_photos(qkv_bias, tmp_path):
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, qkv_bias=qkv_bias)
    model = random_model("ViTModel", config)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    convert.main(["--from=huggingface", "--to=capvl", str(tmp_path), str(tmp_path / "ours")])
    seen = photos(4)
    pixel_values = processor(images=[opened(p) for p in seen], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixel_values).last_hidden_state
    assert_close(capvl.load(str(tmp_path / "ours")).embed(seen), expected[:, 0], 2e-5)


def test_a_text_eps_of_0_beside_another_is_refused(tmp_path):
    text = SIZES | dict(vocab_size=50, max_position_embeddings=8, layer_norm_eps=0.0)
    config = transformers.CLIPConfig(vision_config=dict(**SIZES, image_size=32, patch_size=8), text_config=text)
    random_model("CLIPModel", config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="eps=0 beside 1e-05"):
        formats.read("huggingface", str(tmp_path))


def test_siglip_2_without_tokenizer_is_refused(tmp_path):
    """Its config.json names no padding, and another default would be wrong."""
    text = SIZES | dict(vocab_size=256, max_position_embeddings=8, projection_size=24)
    config = transformers.SiglipConfig(vision_config=dict(**SIZES, image_size=32, patch_size=8), text_config=text)
    random_model("SiglipModel", config).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["text_config"].pop("pad_token_id", None)
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="pad_token_id, and there is no tokenizer"):
        formats.read("huggingface", str(tmp_path))
