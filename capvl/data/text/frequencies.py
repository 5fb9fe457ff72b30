"""In how many images of a data set the n-grams of its captions occur, for self-critical training."""

import os

import numpy as np
from etils import epath

from capvl import storage
from capvl.errors import UserError
from capvl.losses.cider import BUCKETS, ORDERS, count_documents

LONGEST = 64


def write(path: str, source, tokenizer, captions: int) -> int:
    """Writes the table; returns the number of images.

    Args:
      path: .npz to write.
      source: data set with `text`.
      tokenizer: as in training.
      captions: of an image, the first so many.
    """

    def documents():
        for i in range(len(source)):
            tokens = np.zeros((captions, LONGEST), np.int32)
            for row, text in zip(tokens, source[i]["text"], strict=False):
                row[:] = tokenizer(text, LONGEST)
            yield np.where(tokens == tokenizer.eos, 0, tokens)

    counts, number = count_documents(documents())
    with storage.new_file(epath.Path(path)) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, counts=counts, documents=np.int64(number))
    return number


def read(path: str) -> tuple[np.ndarray, int]:
    """The table and the number of images.

    Raises:
      UserError: missing or no such table.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"The n-gram frequencies {path!r} are missing; write them with "
            f"`python -m capvl.data.frequencies --data=NAME --tokenizer=FILE --out={path}`."
        )
    try:
        with np.load(path, allow_pickle=False) as values:
            counts, number = values["counts"], int(values["documents"])
    except (ValueError, KeyError, OSError, EOFError) as e:
        raise UserError(f"{path!r} holds no n-gram frequencies: {e}") from e
    if counts.shape != (ORDERS, BUCKETS):
        raise UserError(f"{path!r} holds a table of shape {counts.shape}, not {(ORDERS, BUCKETS)}.")
    return counts, number
