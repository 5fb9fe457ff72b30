"""Which characters tokens cover, and the tokens of phrases."""

import gzip

import golden_glip
import numpy as np
import pytest
from conftest import real_data

from capvl.data.scenes import making
from capvl.data.text import tokenizers
from capvl.data.text.cleaning import clean, origins, xvlm_caption
from capvl.data.text.spans import class_weights, positive_map, shares
from capvl.data.text.tokenizers import SubwordTokenizer, Tokenizer
from capvl.data.text.training import train
from capvl.errors import UserError

ODD = "  Zoë's café 🌍,  ﬁsh  [SEP] “Dogs”. שלום ½ [the END]"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    found = golden_glip.load("text")
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in found["vocab"]))
    return found, SubwordTokenizer(path)


@pytest.fixture(scope="module")
def every(tmp_path_factory, data_dir):
    """One tokenizer of each kind, the CLIP's with its cleaning."""
    folder = tmp_path_factory.mktemp("tokenizers")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text(
        "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ndog\n##s\nfish\ncafe\nzoe\n'\ns\n.\n[\n]\nsep\nthe\nend\n"
    )
    merges = "#version\nd o\ndo g\nf i\n" + "x y\n" * 48_892
    with gzip.open(folder / "bpe.txt.gz", "wb") as file:
        file.write(merges.encode())
    return [
        Tokenizer(making.scenes_tokenizer(data_dir)),
        train(["dogs. cats. Zoë's café " * 5, "the fish s. 🌍"], 60, folder / "small.model"),
        SubwordTokenizer(vocabulary),
        SubwordTokenizer(folder / "bpe.txt.gz"),
    ]


@pytest.mark.parametrize("text", [ODD, "", "   ", "a dog", ODD.encode(), b"\xff dogs"])
@pytest.mark.parametrize("length", [5, 64])
def test_tokens_are_those_of_the_call(every, text, length):
    for tokenizer in every:
        tokens, start, end = tokenizer.spans(text, length)
        np.testing.assert_array_equal(tokens, tokenizer(text, length))
        own = np.flatnonzero(start >= 0)
        assert ((start >= 0) == (end >= 0)).all()
        assert (end[own] >= start[own]).all()
        assert (np.diff(start[own]) >= 0).all()
        ends = np.count_nonzero(tokenizer("", length))
        assert len(own) == np.count_nonzero(tokens) - ends


def test_tokens_cover_what_they_mean(every):
    """Each token's characters, read alone, are that token or the unknown one; no letter is left out."""
    for tokenizer in every:
        tokens, start, end = tokenizer.spans(ODD, 128)
        covered = set()
        for a, b in zip(start, end, strict=True):
            covered |= set(range(a, b))
            assert a < 0 or not ODD[a:b][:1].isspace()
        assert {i for i, c in enumerate(ODD) if not c.isspace()} <= covered
    words = every[2].spans("Dogs, ZOË's  Cafe", 16)
    assert [("Dogs, ZOË's  Cafe")[a:b] for a, b in zip(words.start, words.end, strict=True) if a >= 0] == (
        ["Dog", "s", ",", "ZOË", "'", "s", "Cafe"]
    )


def test_cut_texts_cover_no_more(every):
    for tokenizer in every:
        whole, cut = tokenizer.spans("a dog and dogs and cats", 64), tokenizer.spans("a dog and dogs and cats", 6)
        np.testing.assert_array_equal(cut.start[:5], whole.start[:5])
        assert cut.start[5] == cut.end[5] == -1


@pytest.mark.golden
def test_phrases_have_the_official_tokens(golden):
    found, tokenizer = golden
    for case in found["grounding_cases"]:
        ids, offsets = case["input_ids"], case["offsets"]
        covered = tokenizer.spans(case["caption"], len(ids) + 3)
        assert covered.tokens.tolist() == [*ids, 0, 0, 0]
        inner = slice(1, len(ids) - 1)
        assert np.stack([covered.start, covered.end], 1)[inner].tolist() == offsets[inner]
        rows = positive_map(case["tokens_positive"], covered)
        assert [np.flatnonzero(row).tolist() for row in rows] == case["positive_map_nonzero"]
        np.testing.assert_array_equal(shares(rows).max(-1), np.float32(case["positive_map_value"]))


@pytest.mark.golden
def test_captions_of_the_whole_detector(golden):
    """Spans of the end-to-end case are whole names, and each has tokens of its own."""
    found = golden_glip.load("e2e_text")
    for caption, spans in zip(found["captions"], found["spans"], strict=True):
        covered = golden[1].spans(caption, 64)
        rows = positive_map([[span] for span in spans], covered)
        for row, (first, end) in zip(rows, spans, strict=True):
            assert (covered.start[row].min(), covered.end[row].max()) == (first, end)
        assert rows.sum(0).max() == 1


def test_blanks_at_the_ends_of_a_phrase():
    """Two are passed over, not three; and never to the other side."""
    text = "dog   cat"
    covered = tokenizers.TokenSpans(*(np.array(x, np.int32) for x in ([2, 5, 6, 3], [-1, 0, 6, -1], [-1, 3, 9, -1])))
    assert text[6:9] == "cat"
    rows = positive_map([[(4, 9)], [(3, 9)], [(0, 5)], [(0, 6)], [(9, 12)], [(0, 3), (6, 9)], []], covered)
    assert [np.flatnonzero(row).tolist() for row in rows] == [[2], [], [1], [], [], [1, 2], []]


def test_phrases_that_are_cut_off_have_no_tokens(every):
    text = "a dog and dogs and cats"
    for tokenizer in every:
        assert positive_map([[(19, 23)]], tokenizer.spans(text, 64)).any()
        assert not positive_map([[(19, 23)], [(0, 23)]], tokenizer.spans(text, 5)).any()


@pytest.mark.golden
def test_weights_average_tokens_to_classes():
    found = golden_glip.load("scoreconv")
    probabilities, labels = found["in/probs"], found["in/label_ids"]
    rows = np.zeros((len(labels), probabilities.shape[-1]), bool)
    for row, first, last in zip(rows, found["in/token_starts"], found["in/token_ends"], strict=True):
        row[first : last + 1] = True
    for name in ("v1_MEAN", "v2_MEAN"):
        expected = found[f"out/{name}"]
        weights = class_weights(rows, labels - 1, expected.shape[-1])
        golden_glip.close(probabilities @ weights, expected, 1e-6, name)
    most = np.where(weights[None, None] > 0, probabilities[..., None], 0).max(2)
    golden_glip.close(most, found["out/v2_MAX"], 1e-6)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A  t-shirt, (RED)!", xvlm_caption("A  t-shirt, (RED)!")),
        ("“Zoë’s” ﬁsh\tand Ὀδυσσεύς", clean("“Zoë’s” ﬁsh\tand Ὀδυσσεύς")),
        ("<person> with a-b", xvlm_caption("<person> with a-b")),
        ("", ""),
    ],
)
def test_cleaned_letters_are_followed(text, cleaned):
    places = origins(text, cleaned)
    assert len(places) == len(cleaned)
    assert places == sorted(places)
    letters = [(c, text[i]) for c, i in zip(cleaned, places, strict=True) if c.isalpha() and c.isascii()]
    assert all(theirs.lower() in (c, "ë", "ﬁ") for c, theirs in letters)


def test_changed_letters_are_refused(every):
    with pytest.raises(UserError, match="changes its letters"):
        every[3].spans("salt &amp; pepper", 16)
    with pytest.raises(UserError, match="changes its letters"):
        origins("a dog", "a do")
    every[3].spans("salt & pepper", 16)


@pytest.mark.realdata
def test_real_vocabularies():
    """ "cafe" and "fish" are where they stand, whatever the tokenizer makes of them."""
    for name in (
        "bert-base-uncased-vocab.txt",
        "bpe_simple_vocab_16e6.txt.gz",
        "cc_all.32000.100extra.sentencepiece.model",
    ):
        covered = tokenizers.load(real_data("tokenizers", name)).spans(ODD, 64)
        for word in ("café", "ﬁsh", "Dogs", "END"):
            first = ODD.index(word)
            row = positive_map([[(first, first + len(word))]], covered)[0]
            assert covered.start[row].min() == first, (name, word)
            assert covered.end[row].max() == first + len(word), (name, word)
