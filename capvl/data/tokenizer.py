"""SentencePiece tokenizers: from a file, or trained from a data set's captions.

    python -m capvl.data.tokenizer --data=flickr8k --vocab=4000 --out=flickr8k.model

A text becomes `length` ids: the pieces, then the end-of-sentence id, then 0. The end is
"sticky": where the text is too long it is cut and still ends with the end-of-sentence id.
"""

import argparse
import functools
import io
import os
import pathlib

import numpy as np
import sentencepiece

from capvl.errors import UserError

PAD, EOS, UNK = 0, 1, 2
MAX_CHARACTERS = 4096


class Tokenizer:
    """A SentencePiece model whose id 0 is padding. Pickles as its path."""

    def __init__(self, path: str | os.PathLike):
        """path: the .model file.

        Raises:
          UserError: it is missing, not a SentencePiece model, or has no end-of-sentence piece.
        """
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise UserError(
                f"Tokenizer {self.path!r} is missing; train one with "
                f"`python -m capvl.data.tokenizer --data=NAME --vocab=N --out={self.path}`."
            )
        self._load()

    def _load(self):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=self.path)
        except (RuntimeError, OSError) as e:
            raise UserError(f"Tokenizer {self.path!r} is not a SentencePiece model.") from e
        self.eos = self._model.eos_id()
        if self.eos < 1:
            raise UserError(f"Tokenizer {self.path!r} has no end-of-sentence piece with an id above 0.")

    def __reduce__(self):
        return (Tokenizer, (self.path,))

    @property
    def vocab(self) -> int:
        """Number of ids."""
        return self._model.vocab_size()

    def __call__(self, text: str | bytes, length: int) -> np.ndarray:
        """(length,) int32 ids: pieces, end of sentence, padding."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        ids = self._model.encode(text[:MAX_CHARACTERS])[: length - 1]
        out = np.zeros(length, np.int32)
        out[: len(ids)] = ids
        out[len(ids)] = self.eos
        return out

    def decode(self, ids: np.ndarray) -> str:
        """The text up to the end of sentence or padding."""
        ids = np.asarray(ids).tolist()
        for stop in (self.eos, PAD):
            if stop in ids:
                ids = ids[: ids.index(stop)]
        return self._model.decode([i for i in ids if i < self.vocab])


@functools.cache
def load(path: str) -> Tokenizer:
    """The tokenizer of a path, loaded once."""
    return Tokenizer(path)


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
    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + f".{os.getpid()}")
    temporary.write_bytes(buffer.getvalue())
    temporary.rename(out)
    return Tokenizer(out)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    from capvl.data import sources

    parser = argparse.ArgumentParser(description="Train a SentencePiece tokenizer from a data set's captions.")
    parser.add_argument("--data", required=True, help="a prepared data set, by name or folder")
    parser.add_argument("--split", default="train")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--vocab", type=int, required=True, help="number of pieces")
    parser.add_argument("--out", required=True, help="path of the .model file to write")
    args = parser.parse_args(argv)
    source = sources.open_source(args.data, args.split, args.data_dir, features=("text",))
    tokenizer = train((text for i in range(len(source)) for text in source[i]["text"]), args.vocab, args.out)
    print(f"{args.out}: {tokenizer.vocab} pieces from {len(source)} examples")


if __name__ == "__main__":
    from capvl.main import run

    run(main)
