"""What is done to a text before a tokenizer splits it, as the code that a model was trained with does it."""

import html
import os
import pathlib
import re
import string
import unicodedata
from collections.abc import Callable
from typing import Any

import ftfy

from capvl.errors import UserError
from capvl.lines import parse_json, read_text

SETTINGS = "tokenizer_config.json"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str) -> str:
    """A text as CLIP's code cleans it before it is split: broken encodings and typographic forms are mended by ftfy,
    HTML entities become characters, twice, blanks single spaces, and letters small (Python's way: a final sigma)."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # Nothing is mended in those.
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def siglip(text: str) -> str:
    """A text as transformers' SiglipTokenizer has it: letters small, no punctuation of ASCII, blanks single spaces."""
    return siglip_with_case(text.lower())


def siglip_with_case(text: str) -> str:
    """As `siglip`, with letters as they are."""
    text = text.replace("▁", " ").translate(_NO_PUNCTUATION)
    return re.sub(r"\s+", " ", text).strip()


def canonicalize(text: str) -> str:
    """As `siglip`, the way open_clip has it: an underscore is a blank."""
    return " ".join(text.replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


def lower(text: str) -> str:
    """Letters small."""
    return text.lower()


_XVLM_DROPPED = str.maketrans(dict.fromkeys(",.'!?\"()*#:;~") | dict.fromkeys("-/", " "))


def xvlm_question(text: str) -> str:
    """A question as X-VLM's code (arXiv 2111.08276) cleans it: letters small, without the signs ,.'!?"()*#:;~ and with
    blanks for - and /; blanks at the end are dropped, others stay as they are."""
    return text.lower().translate(_XVLM_DROPPED).rstrip(" ")


def xvlm_caption(text: str) -> str:
    """A caption or phrase as X-VLM's code cleans it: as `xvlm_question`, with `person` for `<person>`, blanks single.

    Nothing may be left of it: X-VLM leaves such a text out.
    """
    return re.sub(r"\s{2,}", " ", xvlm_question(text).replace("<person>", "person")).rstrip("\n").strip(" ")


def unchanged(text: str) -> str:
    """The text as it is."""
    return text


# By the key "clean" of tokenizer_config.json, which conversion writes: open_clip's names, and X-VLM's rule.
CLEANERS = {"": unchanged, "lower": clean, "canonicalize": canonicalize, "xvlm": xvlm_caption}


def settings(path: str | os.PathLike) -> dict[str, Any]:
    """What tokenizer_config.json beside a tokenizer's file says; {} where there is none.

    Raises:
      UserError: it is not a JSON object.
    """
    file = pathlib.Path(path).with_name(SETTINGS)
    if not file.is_file():
        return {}
    try:
        values = parse_json(read_text(str(file), "Tokenizer's settings"))
    except ValueError as e:
        raise UserError(f"{str(file)!r} is not JSON.") from e
    if not isinstance(values, dict):
        raise UserError(f"{str(file)!r} should be a JSON object.")
    return values


def cleaner(said: dict[str, Any]) -> Callable[[str], str]:
    """What is done to a text before a tokenizer with these settings splits it.

    Raises:
      UserError: the key "clean" is not one of CLEANERS.
    """
    kind = str(said.get("tokenizer_class", "")).removesuffix("Fast")
    if kind == "SiglipTokenizer":
        return siglip if said.get("do_lower_case", True) else siglip_with_case
    if kind == "Siglip2Tokenizer":
        return lower
    name = said.get("clean", "")
    if name not in CLEANERS:
        raise UserError(f"tokenizer_config.json has clean={name!r}; known are {', '.join(filter(None, CLEANERS))}.")
    return CLEANERS[name]


def origins(text: str, cleaned: str) -> list[int]:
    """Which character of a text each character of its cleaned form comes from, (len(cleaned),).

    Letters and digits must be the same, in order, but for their case and their form (accents apart, ligatures); blanks
    and signs may have been dropped, added or replaced.

    Raises:
      UserError: letters differ, as where "&amp;" has become "&".
    """
    theirs = [(c, i) for i, character in enumerate(text) for c in _folded(character) if not c.isspace()]
    found, place = [], 0
    for character in cleaned:
        found.append(theirs[place][1] if place < len(theirs) else max(len(text) - 1, 0))
        for n, c in enumerate(_folded(character)):
            if c.isspace():
                continue
            end = place
            while end < len(theirs) and theirs[end][0] != c and not theirs[end][0].isalnum():
                end += 1
            same = end < len(theirs) and theirs[end][0] == c
            if not same and c.isalnum():
                raise _other_letters(text)
            if same and n == 0:
                found[-1] = theirs[end][1]
            # A sign that isn't there has replaced another, or been added before a letter.
            place = end + 1 if same else min(place + 1, end)
    if any(c.isalnum() for c, _ in theirs[place:]):
        raise _other_letters(text)
    return found


def _folded(character: str) -> str:
    return unicodedata.normalize("NFKD", character.casefold())


def _other_letters(text: str) -> UserError:
    return UserError(
        f"Phrases can't be followed in {text[:60]!r}: the tokenizer's cleaning changes its letters; clean the texts "
        "before, with the phrases' places."
    )
