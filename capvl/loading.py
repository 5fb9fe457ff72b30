"""`capvl.load`: a model from a path, ready to be asked."""

import dataclasses
import os

from capvl.convert.folder import read_model
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.inference.face import LoadedModel


def load(
    path: str, *, step: int | None = None, tokenizer: str = "", dtype: str = "", trust: bool = False
) -> LoadedModel:
    """A model from a run's workdir, a converted folder or a big_vision .npz.

    Args:
      path: where it is.
      step: of a workdir's checkpoint; None for the newest.
      tokenizer: path of a tokenizer, with the vocabulary of the model's own where that is there; "" for that.
      dtype: "float32" or "bfloat16" for activations; "" for the model's own.
      trust: import the code that a workdir names, of an objective of one's own; nothing of a folder is run else.

    Raises:
      UserError: missing, unreadable, none of these, or in need of code that is not trusted.
    """
    for name, value in (("path", path), ("tokenizer", tokenizer)):
        if not isinstance(value, str | os.PathLike):
            raise UserError(f"{name} should be a path, not {value!r}.")
    weights = read_model(os.fspath(path), step=step, trust=trust)
    if tokenizer:
        if weights.tokenizer:
            tokenizers.check_same_texts(tokenizer, weights.tokenizer)
        weights = dataclasses.replace(weights, tokenizer=os.fspath(tokenizer))
    if dtype:
        weights = dataclasses.replace(weights, options=dataclasses.replace(weights.options, dtype=dtype))
    return LoadedModel(weights, os.fspath(path))
