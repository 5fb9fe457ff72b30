"""The tokenizer beside another framework's weights: its files, its padding, and how they go along."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from capvl.convert.files import read_json
from capvl.data.text import tokenizers
from capvl.data.text.cleaning import SETTINGS, settings
from capvl.errors import UserError

_NAMES = ("tokenizer.json", "spiece.model", "vocab.json", "vocab.txt")
NAMES_BY_SUFFIX = {".json": "tokenizer.json", ".model": "spiece.model", ".txt": "vocab.txt"}
"""What a tokenizer's file is called beside another framework's weights, so that `find` finds it."""
_SPECIAL = "special_tokens_map.json"


def find(path: str) -> str:
    """The tokenizer's file in a folder, or in that of a file; "" where there is none.

    SigLIP's own tokenizer is its SentencePiece model: what tokenizer.json beside it does to texts is not the same.
    """
    folder = pathlib.Path(path)
    folder = folder if folder.is_dir() else folder.parent
    found = [folder / name for name in _NAMES if (folder / name).exists()]
    found = [file for file in found if file.name != "vocab.json" or (folder / "merges.txt").exists()]
    if settings(folder / SETTINGS).get("tokenizer_class") == "SiglipTokenizer":
        found.sort(key=lambda file: file.name != "spiece.model")
    return str(found[0]) if found else ""


def padding(file: str) -> int | None:
    """Id with which a tokenizer's texts are filled up, from the files beside it; None where they don't say.

    Raises:
      UserError: they are filled up in front, or with a piece that the tokenizer has not.
    """
    if not file:
        return None
    values = settings(file)
    if values.get("padding_side", "right") != "right":
        raise UserError(f"{SETTINGS} fills texts up on the {values['padding_side']}; only the right is known here.")
    piece = values.get("pad_token")
    special = pathlib.Path(file).with_name(_SPECIAL)
    if piece is None and special.exists():
        piece = read_json(special).get("pad_token")
    if piece is None and values.get("tokenizer_class") == "SiglipTokenizer":
        piece = "</s>"
    piece = piece.get("content") if isinstance(piece, dict) else piece
    if piece is None:
        return None
    found = tokenizers.load(file).id_of(piece)
    if found is None:
        raise UserError(f"The pad_token {piece!r} is no piece of the tokenizer {file!r}.")
    return found


def open_clip_cleaning(text: Mapping[str, Any], file: str) -> str:
    """A key of `capvl.data.text.cleaning.CLEANERS` from an open_clip model's text_cfg, for the tokenizer beside it.

    Raises:
      UserError: it is another.
    """
    if not text.get("hf_tokenizer_name"):
        return "lower"
    clean = (text.get("tokenizer_kwargs") or {}).get("clean", "whitespace")
    if clean not in ("lower", "canonicalize"):
        raise UserError(
            f"open_clip's text_cfg cleans texts for {file!r} by {clean!r}; known are 'lower' and 'canonicalize'."
        )
    return clean


def of_vocabulary(axes: Iterable[tuple]) -> bool:
    """Whether some parameters are over ids of tokens: tables and output layers, by the logical axes of each."""
    return any({"vocab", "token"} & set(each) for each in axes)


def copy(file: str, folder: pathlib.Path, name: str, clean: str = "") -> str:
    """Copies a tokenizer with what belongs to it.

    Args:
      file: its file.
      folder: where to.
      name: of the copy.
      clean: how texts are cleaned, where that is not in the files beside; a key of `capvl.data.text.cleaning.CLEANERS`.

    Returns:
      The name of the copy.
    """
    itself, *beside = tokenizers.copies(file, **({"clean": clean} if clean else {})).items()
    for target, data in ((name, itself[1]), *beside):
        (folder / target).write_bytes(data)
    special = pathlib.Path(file).with_name(_SPECIAL)
    if special.exists():
        (folder / _SPECIAL).write_bytes(special.read_bytes())
    return name
