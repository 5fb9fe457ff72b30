"""Tokenizers trained from texts: SentencePiece's unigram models, and word pieces as BERT's."""

import io
import os
import pathlib

import sentencepiece
import tokenizers
from etils import epath

from capvl import storage
from capvl.data.text.tokenizers import EOS, MAX_CHARACTERS, PAD, SPECIAL, UNK, SubwordTokenizer, Tokenizer
from capvl.errors import UserError


def train(texts, vocab: int, out: str | os.PathLike) -> Tokenizer:
    """Trains a unigram model (padding 0, end 1, unknown 2, no start) and writes it to `out`.

    The same texts give the same model.

    Raises:
      UserError: the texts don't hold so many pieces.
    """
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=buffer,
            vocab_size=vocab,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            max_sentence_length=MAX_CHARACTERS,
        )
    except (RuntimeError, OSError) as e:
        raise UserError(f"No tokenizer of {vocab} pieces can be trained from these texts: {e}") from e
    _write(out, buffer.getvalue())
    return Tokenizer(out)


def train_word_piece(texts, vocab: int, out: str | os.PathLike) -> SubwordTokenizer:
    """Trains a vocabulary of lower-case word pieces as BERT's, at most `vocab`, and writes it, one a line, to `out`.

    [PAD] is 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4.

    Raises:
      UserError: the file's name does not end with .txt, by which such a vocabulary is known.
    """
    if not os.fspath(out).endswith(".txt"):
        raise UserError(f"A vocabulary of word pieces should be a .txt file, not {os.fspath(out)!r}.")
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=SPECIAL[1]))
    model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    texts = [t.decode("utf-8", "replace") if isinstance(t, bytes) else t for t in texts]
    # The library numbers continuations in the order of a random hash, and breaks ties by these numbers.
    begun = (word for t in texts for word, _ in model.pre_tokenizer.pre_tokenize_str(model.normalizer.normalize_str(t)))
    continuations = sorted({f"##{letter}" for word in begun for letter in word[1:]})
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab, special_tokens=[*SPECIAL, *continuations], show_progress=False, min_frequency=2
    )
    model.train_from_iterator(texts, trainer)
    pieces = model.get_vocab()
    _write(out, "".join(f"{piece}\n" for piece in sorted(pieces, key=pieces.get)).encode())
    return SubwordTokenizer(out)


def _write(out: str | os.PathLike, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    path = pathlib.Path(out)
    storage.make_folder(path.parent)
    storage.replace_bytes(epath.Path(path), data)


TRAINERS = {"unigram": train, "wordpiece": train_word_piece}
