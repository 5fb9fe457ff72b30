"""X-VLM's masking: against the golden frequencies, and on the three kinds of vocabularies."""

import dataclasses
import pickle

import numpy as np
import pytest
import tokenizers
from conftest import load_golden, real_data

from capvl.data.randomness import Uniforms
from capvl.data.text.masking import Masking, continuations
from capvl.data.text.tokenizers import SubwordTokenizer, Tokenizer
from capvl.data.text.training import train, train_word_piece
from capvl.errors import UserError

WORDS = "red blue green large small circle square triangle left right above below playing unwillingly"
# A vocabulary of single ids below 40 whose ids from 30 on continue a word; 1 starts, 2 ends, 39 is the mask.
PLAIN = Masking(39, 40, 1, 2, np.arange(40) >= 30)


def draws(masking, ids, count):
    return [masking(np.array(ids, np.int32), Uniforms(0, i)) for i in range(count)]


@pytest.mark.golden
def test_golden_frequencies():
    golden = load_golden("xvlm", "xvlm_util.npz")
    pieces = [str(piece) for piece in golden["mask.tokens"]]
    vocab = 5000  # So that a random token hardly ever is the one that stood there.
    continues = np.zeros(vocab, bool)
    continues[1 : len(pieces) + 1] = continuations(pieces)
    ids = np.arange(1, len(pieces) + 1, dtype=np.int32)
    masking = Masking(vocab - 1, vocab, int(ids[0]), vocab - 2, continues)
    count = 20_000
    places, counts, kinds = np.zeros(len(pieces)), np.zeros(len(golden["mask.count_hist"])), np.zeros(3)
    for masked, positions, targets in draws(masking, ids, count):
        used = targets >= 0
        np.testing.assert_array_equal(targets[used], ids[positions[used]])
        places[positions[used]] += 1
        counts[used.sum()] += 1
        now = masked[positions[used]]
        kept = now == targets[used]
        kinds += [(now == masking.mask).sum(), (~kept & (now != masking.mask)).sum(), kept.sum()]
        untouched = np.setdiff1d(np.arange(len(ids)), positions[used])
        np.testing.assert_array_equal(masked[untouched], ids[untouched])
    np.testing.assert_array_equal(counts / count, golden["mask.count_hist"])
    # Four standard deviations of the difference of two such samples.
    for ours, theirs, n in (
        (places / count, golden["mask.position_freq"], count),
        (kinds / kinds.sum(), golden["mask.kind_mask_random_keep"], kinds.sum()),
    ):
        deviation = np.sqrt(2 * theirs * (1 - theirs) / n)
        assert (np.abs(ours - theirs) <= 4 * deviation).all(), (ours, theirs)


@pytest.mark.parametrize("begin", [10, 30])
def test_words_are_taken_whole(begin):
    # The first word may lack the marker of words that follow a blank, as in byte-level vocabularies.
    ids = [1, begin, 30, 31, 11, 32, 12, 33, 2, 0]
    words = ({1, 2, 3}, {4, 5}, {6, 7})
    masking = dataclasses.replace(PLAIN, share=0.25, skip_gram=0.0)  # Two of eight, the start included.
    seen = {frozenset(p[t >= 0].tolist()) for _, p, t in draws(masking, ids, 300)}
    assert {frozenset(words[1]), frozenset(words[2])} <= seen
    assert all(any(taken <= word for word in words) for taken in seen)  # Never parts of two.
    all_of_them = dataclasses.replace(masking, share=1.0)
    for masked, p, t in draws(all_of_them, ids, 20):
        assert p[t >= 0].tolist() == list(range(1, 8)) and (masked[0], *masked[8:]) == (1, 2, 0)


def test_length_does_not_count_the_end_and_one_is_masked_at_least():
    for size, expected in ((1, 1), (5, 2), (6, 2), (12, 3), (13, 4), (25, 6), (39, 8)):
        rows = ([1, *[10] * size, 2], [1, *[10] * size])
        for row in rows:
            masking = dataclasses.replace(PLAIN, continues=None, skip_gram=0.0)
            assert all((targets >= 0).sum() == expected for _, _, targets in draws(masking, row, 20)), (size, row)


@pytest.mark.parametrize("row", [[1, 2, 0], [1, 0, 0], [0, 0, 0], [2, 0, 0]])
def test_nothing_to_mask(row):
    masked, positions, targets = PLAIN(np.array(row, np.int32), Uniforms(0, 0))
    np.testing.assert_array_equal(masked, row)
    assert (targets == -1).all() and (positions == 0).all()
    assert all(a.dtype == np.int32 for a in (masked, positions, targets)) and len(targets) == PLAIN.most


def test_random_tokens_are_never_padding():
    masking = dataclasses.replace(PLAIN, vocab=3, mask=1, continues=None)
    for masked, *_ in draws(masking, [1, 2, 2], 500):
        assert masked.all()


def test_depends_on_nothing_but_the_uniforms():
    ids = np.array([1, *range(3, 30), 2], np.int32)
    before = ids.copy()
    first, again = PLAIN(ids, Uniforms(7, 3)), pickle.loads(pickle.dumps(PLAIN))(ids, Uniforms(7, 3))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(ids, before)
    assert any((first[0] != PLAIN(ids, Uniforms(7, i))[0]).any() for i in range(4, 8))


def byte_level(folder) -> SubwordTokenizer:
    """RoBERTa's kind: byte-level pairs, "<s>" 0, "</s>" 2, "<mask>"."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator([WORDS] * 20, trainer)
    model.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    model.save(str(folder / "tokenizer.json"))
    return SubwordTokenizer(folder / "tokenizer.json")


def sentence_pieces(folder) -> Tokenizer:
    return train([w for w in WORDS.split() for _ in range(20)] + [WORDS] * 20, 34, folder / "t.model")


def word_pieces(folder) -> SubwordTokenizer:
    return train_word_piece([WORDS] * 20, 80, folder / "t.txt")


@pytest.mark.parametrize("make", [byte_level, sentence_pieces, word_pieces])
def test_where_words_begin_in_every_kind_of_vocabulary(make, tmp_path):
    tokenizer = make(tmp_path)
    masking = Masking.for_tokenizer(tokenizer, mask_id=3 if make is sentence_pieces else None)
    ids = tokenizer("unwillingly small playing", 40)
    end = int(np.flatnonzero(ids == tokenizer.eos)[0])
    starts = [int(ids[0] == tokenizer.start_id)]
    for words in ("unwillingly", "unwillingly small"):
        starts.append(int(np.flatnonzero(tokenizer(words, 40) == tokenizer.eos)[0]))
    assert end - starts[0] > len(starts)
    begins = [i for i in range(starts[0], end) if i == starts[0] or not masking.continues[ids[i]]]
    assert begins == starts


def test_a_bert_vocabulary():
    path = real_data("tokenizers", "bert-base-uncased-vocab.txt")
    masking = Masking.for_tokenizer(SubwordTokenizer(path))
    pieces = SubwordTokenizer(path).pieces()
    assert pieces[masking.mask] == "[MASK]" and masking.continues.sum() == sum(p.startswith("##") for p in pieces)


def test_a_vocabulary_without_a_mask_token(tmp_path):
    tokenizer = sentence_pieces(tmp_path)
    with pytest.raises(UserError, match="has no mask token"):
        Masking.for_tokenizer(tokenizer)
    assert Masking.for_tokenizer(tokenizer, mask_id=3).mask == 3


def test_a_vocabulary_that_tells_no_words():
    with pytest.raises(UserError, match="whole_words=False"):
        continuations(["a</w>", "b", "<mask>"])


@pytest.mark.parametrize(
    "wrong", [{"mask": 0}, {"mask": 40}, {"most": 0}, {"share": 0.0}, {"skip_gram": 1.5}, {"skip_gram_most": 1}]
)
def test_bad_options(wrong):
    with pytest.raises(UserError):
        dataclasses.replace(PLAIN, **wrong)
