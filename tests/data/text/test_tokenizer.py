"""Tokenizers: sticky end, odd texts, and models that can't be used."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, real_data

from capvl.data.reading import sources
from capvl.data.scenes import making
from capvl.data.text import cleaning, tokenizers, training
from capvl.data.text.tokenizers import EOS, Tokenizer
from capvl.data.text.training import train
from capvl.data.tokenizer import main
from capvl.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(data_dir):
    return Tokenizer(making.scenes_tokenizer(data_dir))


def test_sticky_end(tokenizer):
    short = tokenizer("a red circle", 12)
    assert list(short[np.flatnonzero(short)][-1:]) == [EOS]
    assert (short[np.argmax(short == EOS) + 1 :] == 0).all()
    long = tokenizer("a red circle and a blue square " * 50, 12)
    assert long[-1] == EOS
    assert (long[:-1] != EOS).all()
    assert (long != 0).all()


@pytest.mark.parametrize(
    "text", ["", "word " * 10_000, b"\xff\xfe broken", "שלום עולם", "🌍🎉", "a\x00b", b"plain bytes"]
)
def test_odd_texts(tokenizer, text):
    ids = tokenizer(text, 16)
    assert ids.shape == (16,)
    assert ids.dtype == np.int32
    assert (ids == EOS).sum() == 1
    assert ids.max() < tokenizer.vocab
    assert isinstance(tokenizer.decode(ids), str)


def test_decoding_returns_the_text(tokenizer, data_dir):
    source = sources.open_source("scenes/tiny", "val", data_dir, features=("text",))
    for i in range(20):
        for text in source[i]["text"]:
            assert tokenizer.decode(tokenizer(text, 64)) == text.decode()


def test_pickles_as_its_path(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(again("a red ring", 8), tokenizer("a red ring", 8))


def test_training_is_deterministic(tmp_path):
    texts = [f"the {c} {s} number {i}" for i in range(200) for c in ("red", "blue") for s in ("dog", "cat")]
    for name in ("a", "b"):
        train(texts, 60, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_command(data_dir, tmp_path, capsys):
    out = tmp_path / "made.model"
    main([f"--data_dir={data_dir}", "--data=scenes/tiny", "--vocab=100", f"--out={out}"])
    assert "100 pieces from 256 examples" in capsys.readouterr().out
    assert Tokenizer(out).vocab == 100


def test_models_that_can_not_be_used(tmp_path):
    with pytest.raises(UserError, match="is missing; train one"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "bad.model")
    with pytest.raises(UserError, match="No tokenizer of 100 pieces"):
        train([], 100, tmp_path / "x.model")


@pytest.mark.realdata
def test_the_c4_model():
    tokenizer = Tokenizer(real_data("tokenizers", "cc_all.32000.100extra.sentencepiece.model"))
    text = "A dog runs on the beach ."
    assert tokenizer.vocab >= 32_000
    assert tokenizer.decode(tokenizer(text, 64)) == text


@pytest.mark.realdata
def test_clip_ids():
    """Ids that CLIP's users know by heart, and texts that come back."""
    tokenizer = tokenizers.load(real_data("tokenizers", "bpe_simple_vocab_16e6.txt.gz"))
    assert tokenizer.vocab == 49408
    np.testing.assert_array_equal(tokenizer("A photo  of a cat", 9), [49406, 320, 1125, 539, 320, 2368, 49407, 0, 0])
    assert tokenizer.decode(tokenizer("a photo of a cat, isn't it?", 20)) == "a photo of a cat , isn 't it ?"
    cut = tokenizer("a photo of a cat", 4)
    np.testing.assert_array_equal(cut, [49406, 320, 1125, 49407])


@pytest.mark.realdata
def test_bert_ids():
    tokenizer = tokenizers.load(real_data("tokenizers", "bert-base-uncased-vocab.txt"))
    assert tokenizer.vocab == 30522
    np.testing.assert_array_equal(tokenizer("Hello, world!", 8), [101, 7592, 1010, 2088, 999, 102, 0, 0])
    assert tokenizer.decode(tokenizer("unaffable dogs", 12)) == "unaffable dogs"


def test_tokenizer_json_and_bad_files(tmp_path):
    import tokenizers as library

    words = {"[UNK]": 0, "a": 1, "dog": 2, "<end>": 3}
    model = library.Tokenizer(library.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = library.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "endless.json"))
    with pytest.raises(UserError, match="puts no end behind a text"):
        tokenizers.load(str(tmp_path / "endless.json"))
    model.post_processor = library.processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 3)])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = pickle.loads(pickle.dumps(tokenizers.load(str(tmp_path / "tokenizer.json"))))
    np.testing.assert_array_equal(tokenizer("a dog", 5), [1, 2, 3, 0, 0])
    assert tokenizer.decode(np.array([1, 2, 3, 0])) == "a dog"
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="can't be read"):
        tokenizers.load(str(tmp_path / "bad.json"))
    with pytest.raises(UserError, match="is missing"):
        tokenizers.load(str(tmp_path / "none.json"))


def test_a_file_that_changes_is_loaded_anew(tokenizer, tmp_path):
    """As in a notebook that stays open while a run is made again."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        tokenizers.load(path)
    shutil.copyfile(tokenizer.path, path)
    assert tokenizers.load(path).pieces() == tokenizer.pieces()
    assert tokenizers.load(path) is tokenizers.load(str(path))
    other = training.train(["one two three", "four five"] * 20, 20, tmp_path / "other.model")
    shutil.move(other.path, path)
    assert tokenizers.load(path).pieces() != tokenizer.pieces()
    for empty in ("", ".", "/"):
        with pytest.raises(UserError, match="is missing"):
            tokenizers.load(empty)


CLIP = ("tokenizers", "bpe_simple_vocab_16e6.txt.gz")
# As CLIP's users write them: entities, broken encodings, typographic quotes, ligatures, control characters.
ODD = [
    ("salt &amp; pepper", "salt & pepper"),
    ("salt &amp;amp; pepper", "salt & pepper"),
    ("it’s a “cafÃ©”", 'it\'s a "café"'),
    ("ﬁne ＡＢＣ", "fine abc"),
    ("a\u2028dog\x0c runs\u00a0\r\n", "a dog runs"),
    ("&lt;b&gt;&nbsp;x", "<b> x"),
    ("ΑΣ", "ας"),
    ("a\x00b \x1b[36mblue", "ab blue"),
]  # fmt: skip


@pytest.mark.realdata
@pytest.mark.parametrize("text, plain", ODD)
def test_clip_texts_are_cleaned(text, plain):
    tokenizer = tokenizers.load(real_data(*CLIP))
    np.testing.assert_array_equal(tokenizer(text, 24), tokenizer(plain, 24))


def test_clean_texts_stay():
    """The short way around ftfy gives what ftfy gives."""
    import ftfy

    printable = "".join(map(chr, range(32, 127))).replace("&", "")
    for text in (printable, printable[::-1], 'A "dog"  isn\'t <b>here</b>'):
        assert cleaning.clean(text) == " ".join(ftfy.fix_text(text).split()).lower()


@pytest.mark.realdata
@pytest.mark.torch
def test_clip_ids_are_those_of_transformers():
    """The library's tokenizer doesn't clean, so it gets cleaned texts, one by one and of random characters."""
    import gzip
    import html
    import random

    import ftfy

    transformers = pytest.importorskip("transformers")
    path = real_data(*CLIP)
    tokenizer = tokenizers.load(path)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    vocabulary = tokenizer._model.get_vocab()
    other = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    rng = random.Random(0)
    letters = "abc XYZ!?.,'&;<>#|_-0123éßĞ½²数🌍\u00a0\u2028\t’“ﬁ"
    texts = [text for text, _ in ODD] + ["".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(300)]
    for text in texts:
        cleaned = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
        ids = other(cleaned)["input_ids"]
        assert list(tokenizer(text, len(ids))) == ids, text


@pytest.mark.realdata
def test_a_piece_of_id_0_is_no_padding():
    """CLIP's id 0 is "!": inside a text it is read, counted and decoded; what stands behind the end is padding."""
    from capvl.nn import padding

    tokenizer = tokenizers.load(real_data(*CLIP))
    ids = tokenizer("wow!'&! a dog", 16)
    end = int(np.flatnonzero(ids == tokenizer.eos)[0])
    assert 0 in ids[:end]
    assert padding.lengths(ids) == end + 1
    np.testing.assert_array_equal(padding.real(ids), np.arange(16) <= end)
    assert tokenizer.decode(ids).replace(" ", "") == "wow!'&!adog"


def test_vocabularies_end_lines_as_all_files_do(tmp_path):
    """A mark at the beginning, Windows' ends, and pieces that are separators elsewhere move no id."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\x85", "\u2028", "a", "dog"]
    (tmp_path / "v.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(pieces).encode() + b"\r\n")
    tokenizer = tokenizers.load(str(tmp_path / "v.txt"))
    assert tokenizer.vocab == len(pieces)
    np.testing.assert_array_equal(tokenizer("a dog", 5), [2, 6, 7, 3, 0])
    (tmp_path / "w.txt").write_bytes("\n".join(pieces).encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16"):
        tokenizers.load(str(tmp_path / "w.txt"))


SPECIALS = ["[SEP]", "[MASK]", "<|endoftext|>", "</s>", "<s>", "[PAD]"]


@pytest.mark.parametrize("special", SPECIALS)
def test_special_tokens_in_a_caption_are_plain_text(special, tmp_path, data_dir):
    """Neither is a vocabulary's own name of them taken for the token, nor does it end the text."""
    import tokenizers as library

    ends = ("[CLS]", "[SEP]") if special.startswith("[") else ("<s>", special if special != "<s>" else "</s>")
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "a": 3, "dog": 4}
    for name in (*ends, special):
        vocabulary.setdefault(name, len(vocabulary))
    model = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    model.add_special_tokens([name for name in vocabulary if not name.isalpha()])
    model.post_processor = library.processors.TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}", special_tokens=[(name, vocabulary[name]) for name in ends]
    )
    model.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (tokenizers.load(str(tmp_path / "tokenizer.json")), Tokenizer(making.scenes_tokenizer(data_dir))):
        ids = list(tokenizer(f"a {special} dog", 24))
        assert ids.count(tokenizer.eos) == 1 and 0 not in ids[: ids.index(tokenizer.eos)]
        assert vocabulary[special] not in ids[1 : ids.index(tokenizer.eos)] or isinstance(tokenizer, Tokenizer)


def test_settings_go_along_with_a_copy(data_dir, tmp_path, tiny_recipe):
    """What tokenizer_config.json says of letters and punctuation is done, in a workdir's copy too."""
    import shutil

    from etils import epath

    from capvl import workdirs

    plain = making.scenes_tokenizer(data_dir)
    shutil.copyfile(plain, tmp_path / "spiece.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    file = str(tmp_path / "spiece.model")
    expected = tokenizers.load(str(plain))("a red circle", 16)
    np.testing.assert_array_equal(tokenizers.load(file)("A red,  CIRCLE!", 16), expected)
    workdir = tmp_path / "run"
    workdir.mkdir()
    recipe = tiny_recipe(data__tokenizer=file)
    workdirs.write(epath.Path(workdir), recipe, file)
    copy = workdirs.tokenizer_of(epath.Path(workdir), recipe)
    assert copy == str(workdir / "tokenizer.model")
    np.testing.assert_array_equal(tokenizers.load(copy)("A red,  CIRCLE!", 16), expected)
    (tmp_path / "tokenizer_config.json").write_text('{"clean": "nonsense"}')
    with pytest.raises(UserError, match="clean='nonsense'; known are lower, canonicalize"):
        Tokenizer(file)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="should be a JSON object"):
        Tokenizer(file)


def test_a_vocabulary_of_word_pieces_is_the_same_in_every_process(tmp_path):
    """The library's own order hangs on a random hash; hosts and runs need one."""
    code = (
        "import sys; from capvl.data.text.training import train_word_piece\n"
        "train_word_piece(['abcd dcba bacd cabd adbc dbca ' * 3] * 4, 40, sys.argv[1])"
    )
    made = []
    for name in ("a.txt", "b.txt", "c.txt"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, cwd=ROOT)
        made.append((tmp_path / name).read_text())
    assert made[0] == made[1] == made[2]


def test_texts_that_are_cleaned_otherwise_are_others(tmp_path):
    files = [tmp_path / name / "vocab.txt" for name in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]))
    tokenizers.check_same_texts(*map(str, files))
    files[0].with_name("tokenizer_config.json").write_text('{"clean": "xvlm"}')
    with pytest.raises(UserError, match="clean='xvlm' and .* clean=''"):
        tokenizers.check_same_texts(*map(str, files))
