"""Classes as prompts: the official strings and tokens, budgets, sampled negatives."""

import pickle

import golden_glip
import numpy as np
import pytest
from conftest import real_data

from capvl.data.randomness import Uniforms
from capvl.data.scenes import making
from capvl.data.text import tokenizers
from capvl.data.text.category_prompts import DETECTION, Category, Vocabulary, clean_name, sampled_prompt
from capvl.data.text.spans import positive_map
from capvl.data.text.tokenizers import SubwordTokenizer, Tokenizer
from capvl.errors import UserError

WORDS = ["dog", "cat", "fish", "##fish", "jelly", "star", "red", "blue", "small", "large", "and", "with", "a"]
SIGNS = [",", ".", ":", "-", "object", "detection"]
NAMES = ["dog", "cat", "red fish", "jellyfish", "starfish", "blue star", "small dog", "large cat"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    found = golden_glip.load("text")
    return found, vocabulary_of(tmp_path_factory.mktemp("golden"), found["vocab"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *SIGNS]
    return vocabulary_of(tmp_path_factory.mktemp("words"), pieces)


def vocabulary_of(folder, pieces):
    path = folder / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in pieces))
    return SubwordTokenizer(path)


def single(text: str) -> str:
    """Without the blank that the official cleaning leaves behind a name."""
    return " ".join(text.split()).replace(" .", ".")


def in_tokens(prompt) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in prompt.positive]


@pytest.mark.golden
def test_official_prompts(golden):
    found, tokenizer = golden
    for case in found["prompt_cases"]:
        said = case["caption_prompt"] or [{"name": "", "prefix": "", "suffix": ""}] * len(case["categories"])
        values = [
            Category(name, say["name"], say["prefix"], say["suffix"])
            for name, say in zip(case["categories"], said, strict=True)
        ]
        prompt = Vocabulary(values, tokenizer, 256, separator=case["separator"]).prompts()[0]
        ids = case["input_ids"]
        assert single(prompt.text) == single(case["query"])
        assert prompt.tokens.tolist() == ids + [0] * (256 - len(ids))
        expected = [case["label_to_tokens"][str(label)] for label in case["labels"]]
        assert in_tokens(prompt) == expected


@pytest.mark.golden
def test_official_cleaning(golden):
    for name, cleaned in golden[0]["clean_name"]:
        assert clean_name(name) == cleaned


@pytest.mark.golden
def test_official_detection_prompts(golden):
    found, tokenizer = golden
    for case in found["od_simple_cases"]:
        labels = sorted(case["ind_to_class"], key=int)
        prefix = DETECTION if case["add_detection_prompt"] else ""
        vocabulary = Vocabulary([case["ind_to_class"][k] for k in labels], tokenizer, 256, prefix=prefix)
        (prompt,) = vocabulary.prompts()
        assert single(prompt.text) == single(case["caption"])
        numbers = [labels.index(str(label)) for label in case["labels"]]
        covered = tokenizer.spans(case["caption"], 256)
        np.testing.assert_array_equal(covered.tokens, prompt.tokens)
        np.testing.assert_array_equal(prompt.rows(numbers), positive_map(case["tokens_positive"], covered))
        for number, ((first, end),) in zip(numbers, case["tokens_positive"], strict=True):
            begin, stop = prompt.spans[number]
            assert prompt.text[begin:stop] == case["caption"][first:end].strip()


@pytest.mark.golden
def test_official_sampling_has_the_same_invariants(golden):
    """What holds of the official samples holds of ours with the same settings."""
    found, tokenizer = golden
    names = next(case["ind_to_class"] for case in found["od_simple_cases"])
    labels = sorted(names, key=int)
    for case in found["od_sampled_cases"]:
        length, own = case["max_seq_length"] + 2, [labels.index(str(label)) for label in case["labels"]]
        vocabulary = Vocabulary([names[k] for k in labels], tokenizer, length)
        prompt, dropped = sampled_prompt(
            own, vocabulary, Uniforms(case["seed"], 0), negatives=case["random_sample_negative"]
        )
        theirs = {labels.index(k): span for k, span in case["label_to_span"].items()}
        for classes in (theirs, prompt.classes):
            assert set(own) <= set(classes)
            assert len(own) <= len(classes) <= len(own) + case["random_sample_negative"]
        assert not dropped
        assert np.count_nonzero(prompt.tokens) <= length
        for number, (first, end) in zip(prompt.classes, prompt.spans, strict=True):
            assert prompt.text[first:end] == clean_name(names[labels[number]]).strip()
        (as_theirs,) = [vocabulary.prompt(list(theirs))]
        assert single(as_theirs.text) == single(case["caption"])


def test_tokens_are_those_of_the_whole_text(tokenizer, data_dir):
    unigram = Tokenizer(making.scenes_tokenizer(data_dir))
    for used, prefix in ((tokenizer, ""), (tokenizer, DETECTION), (unigram, ""), (unigram, "there is ")):
        vocabulary = Vocabulary([*NAMES, Category("x", "star", "a ", " and dog", "large")], used, 96, prefix=prefix)
        prompt = vocabulary.prompt([3, 8, 0, 5])
        covered = used.spans(prompt.text, 96)
        np.testing.assert_array_equal(prompt.tokens, covered.tokens)
        np.testing.assert_array_equal(prompt.positive, positive_map([[span] for span in prompt.spans], covered))
        assert [prompt.text[a:b] for a, b in prompt.spans] == ["jellyfish", "star", "dog", "blue star"]


@pytest.mark.realdata
def test_tokens_of_real_vocabularies():
    names = ["dogs", "U.S", "hot dog (food)", "cat's tail", "bow_(weapon)", "café", "t-shirt", "no. 7"]
    for name in (
        "bert-base-uncased-vocab.txt",
        "bpe_simple_vocab_16e6.txt.gz",
        "cc_all.32000.100extra.sentencepiece.model",
    ):
        used = tokenizers.load(real_data("tokenizers", name))
        (prompt,) = Vocabulary(names, used, 64).prompts()
        covered = used.spans(prompt.text, 64)
        np.testing.assert_array_equal(prompt.tokens, covered.tokens)
        np.testing.assert_array_equal(prompt.positive, positive_map([[s] for s in prompt.spans], covered))


def test_prompts_lose_no_class_and_fill_the_budget(tokenizer):
    for length in range(5, 40):
        for prefix in ("", "a : "):
            if length < 7 and prefix:
                continue
            prompts = Vocabulary(NAMES, tokenizer, length, prefix=prefix).prompts()
            assert [c for p in prompts for c in p.classes] == list(range(len(NAMES)))
            for prompt, following in zip(prompts, [*prompts[1:], None], strict=True):
                assert np.count_nonzero(prompt.tokens) <= length
                np.testing.assert_array_equal(prompt.tokens, tokenizer(prompt.text, length))
                assert (prompt.positive.sum(1) >= 1).all()
                assert prompt.positive.sum(0).max() == 1
                if following:  # One class more would be too much.
                    more = ". ".join([prompt.text, NAMES[following.classes[0]]])
                    assert np.count_nonzero(tokenizer(more, 99)) > length
    weights = np.stack([p.weights() for p in Vocabulary(NAMES, tokenizer, 9).prompts()])
    np.testing.assert_allclose(weights.sum((0, 1)), np.ones(len(NAMES)), rtol=1e-6)
    assert Vocabulary(NAMES, tokenizer, 9).prompts()[0].weights().shape == (9, len(NAMES))


def test_at_most_so_many_classes(tokenizer):
    prompts = Vocabulary(NAMES, tokenizer, 64).prompts(most=3)
    assert [len(p.classes) for p in prompts] == [3, 3, 2]
    assert [p.text for p in Vocabulary(NAMES, tokenizer, 64).prompts(most=1)] == NAMES


def test_descriptions_bear_no_label(tokenizer):
    values = [
        {"name": "dog", "description": "a small red star "},
        {"name": "odd name", "said": "fish", "suffix": "with a"},
    ]
    (prompt,) = Vocabulary(values, tokenizer, 32).prompts()
    assert prompt.text == "dog, a small red star. fish with a"
    assert in_tokens(prompt) == [[1], [8]]


def test_rows_of_boxes(tokenizer):
    prompt = Vocabulary(NAMES, tokenizer, 32).prompt([2, 0])
    assert [np.flatnonzero(row).tolist() for row in prompt.rows([0, 2, 2, 7])] == [[4], [1, 2], [1, 2], []]


def test_bad_lists(tokenizer):
    for values, said in [
        ([], "is empty"),
        ("dog", "should be a list"),
        (["dog", "cat", "dog "], "'dog' twice"),
        (["dog", "(cat)"], r"left of the class '\(cat\)'"),
        (["dog", "_"], "left of the class"),
        (["dog", 7], "should be a name"),
        ([{"name": "dog", "prefx": "a "}], "Did you mean 'prefix'"),
        ([{"name": "dog", "prefix": 3}], "should be a text"),
        (["dog", "red " * 7 + "fish"], "'red red red red red red red fish' has more than the 6 tokens"),
        (["dog", "\u200b"], "left of the class|no token for the class"),
    ]:
        with pytest.raises(UserError, match=said):
            Vocabulary(values, tokenizer, 8)
    with pytest.raises(UserError, match="end with a blank"):
        Vocabulary(["dog"], tokenizer, 8, separator=".")
    with pytest.raises(UserError, match="no room for 8 of"):
        Vocabulary(NAMES, tokenizer, 8).prompt(range(8))


def test_names_alike_stay_two_classes_and_are_told(tokenizer):
    vocabulary = Vocabulary(["star_(weapon)", "dog", "star_(ribbon)", "Dog", "zebra"], tokenizer, 32)
    assert (vocabulary.alike, vocabulary.unknown) == (((0, 2), (1, 3)), (4,))
    assert vocabulary.doubts() == [
        "'star_(weapon)' and 'star_(ribbon)' are the same in a prompt.",
        "'dog' and 'Dog' are the same in a prompt.",
        "The tokenizer doesn't know all words of 'zebra'.",
    ]
    (prompt,) = vocabulary.prompts()
    assert prompt.text == "star. dog. star. Dog. zebra"
    assert in_tokens(prompt) == [[1], [3], [5], [7], [9]]
    told = [{"name": "star_(weapon)", "description": "red"}, "star_(ribbon)"]
    assert Vocabulary(told, tokenizer, 32).alike == ()


def test_sampled_negatives_are_never_positives_and_as_many_as_asked(tokenizer):
    vocabulary = Vocabulary(NAMES, tokenizer, 64)
    counts = {}
    for seed in range(400):
        prompt, dropped = sampled_prompt([6, 1, 6], vocabulary, Uniforms(seed, 0), negatives=4)
        assert {1, 6} <= set(prompt.classes)
        assert len(set(prompt.classes)) == len(prompt.classes)
        assert not dropped
        others = len(prompt.classes) - 2
        counts[others] = counts.get(others, 0) + 1
    assert sorted(counts) == [1, 2, 3, 4]
    assert abs(counts[4] / 400 - (0.5 + 0.5 / 4)) < 0.08


def test_every_other_class_and_every_order_is_as_likely(tokenizer):
    vocabulary = Vocabulary(NAMES, tokenizer, 64)
    others, first = np.zeros(8), np.zeros(8)
    for seed in range(800):
        prompt, _ = sampled_prompt([2, 5], vocabulary, Uniforms(3, seed), negatives=3, full=1.0)
        others[list(prompt.classes)] += 1
        first[prompt.classes[0]] += 1
    assert others[2] == others[5] == 800
    rest = np.delete(others, [2, 5])
    assert rest.sum() == 3 * 800
    assert np.abs(rest / 800 - 0.5).max() < 0.07
    assert np.abs(first[[2, 5]] / 800 - 0.2).max() < 0.05


def test_samples_are_functions_of_their_random_numbers(tokenizer):
    vocabulary = Vocabulary(NAMES, tokenizer, 24)
    again = pickle.loads(pickle.dumps(vocabulary))
    for i in range(20):
        ours, theirs = sampled_prompt([1], vocabulary, Uniforms(5, i)), sampled_prompt([1], again, Uniforms(5, i))
        assert ours[0].text == theirs[0].text
        np.testing.assert_array_equal(ours[0].tokens, theirs[0].tokens)
    assert len({sampled_prompt([1], vocabulary, Uniforms(5, i))[0].text for i in range(20)}) > 10


def test_positives_come_before_negatives_in_a_small_budget(tokenizer):
    """Too many positives: those that there's no room for are told; negatives take what is left."""
    vocabulary = Vocabulary(NAMES, tokenizer, 10)
    lost = set()
    for seed in range(50):
        prompt, dropped = sampled_prompt(range(6), vocabulary, Uniforms(seed, 1), full=1.0)
        assert set(prompt.classes) & set(range(6)) == set(range(6)) - set(dropped)
        assert np.count_nonzero(prompt.tokens) <= 10
        lost |= set(dropped)
    assert lost == set(range(6))
    prompt, _ = sampled_prompt([0], vocabulary, Uniforms(0, 0), full=1.0)
    assert len(prompt.classes) == 3


def test_images_without_boxes_get_negatives(tokenizer):
    prompt, dropped = sampled_prompt([], Vocabulary(NAMES, tokenizer, 64), Uniforms(0, 0))
    assert 1 <= len(prompt.classes) <= 8
    assert not dropped
    (all_, dropped) = sampled_prompt(range(8), Vocabulary(NAMES, tokenizer, 64), Uniforms(0, 0))
    assert sorted(all_.classes) == list(range(8))
