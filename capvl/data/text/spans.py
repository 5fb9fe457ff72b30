"""Which characters of a text its tokens cover, and which tokens a phrase of it has: GLIP's positive maps.

GLIP (arXiv 2112.03857, section 3.1): a box is trained towards the tokens of its phrases. Phrases are spans of
characters, (first, end), of the text as it is given, before it is cleaned for the tokenizer.

Letters: L tokens, N boxes or classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capvl.data.text.cleaning import origins

Span = tuple[int, int]
REACH = 2
"""So far a phrase that begins or ends with a blank is cut for a character that a token covers (official code)."""


class TokenSpans(NamedTuple):
    """Tokens of a text and the characters that each covers.

    Attributes:
      tokens: (L,) int32 ids, as the tokenizer's call gives them.
      start, end: (L,) int32, first character and end in the text as given; -1 for what is not of the text: start and
        end ids, padding. Both are the same where a token covers nothing but blanks.
    """

    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray


def token_spans(
    text: str, cleaned: str, ids: Sequence[int], offsets: Sequence[Span | None], eos: int, length: int
) -> TokenSpans:
    """The spans of `length` tokens of a text.

    Args:
      text: as it is given.
      cleaned: what the tokenizer has split.
      ids: of its tokens, start and end included.
      offsets: what each covers of `cleaned`; None for a start or an end.
      eos: the end, which stays where the text is cut.
      length: L.

    Raises:
      UserError: the cleaning has changed letters, so that characters can't be followed.
    """
    if len(ids) > length:
        ids, offsets = [*ids[: length - 1], eos], [*offsets[: length - 1], None]
    comes_from = range(len(text)) if cleaned == text else origins(text, cleaned)
    tokens, start, end = np.zeros(length, np.int32), np.full(length, -1, np.int32), np.full(length, -1, np.int32)
    tokens[: len(ids)] = ids
    for i, covered in enumerate(offsets):
        if covered is None:
            continue
        first, last = covered
        while first < last and cleaned[first].isspace():  # Pieces such as "▁dog" have the blank before their word.
            first += 1
        at = comes_from[first] if first < len(cleaned) else len(text)
        start[i], end[i] = at, comes_from[last - 1] + 1 if first < last else at
    return TokenSpans(tokens, start, end)


def characters(text: str) -> list[int]:
    """How many characters begin before each byte of a text in UTF-8, and in all: offsets in bytes -> in characters."""
    data = np.frombuffer(text.encode(), np.uint8)
    begins = (data & 0xC0) != 0x80
    return [0, *np.cumsum(begins).tolist()]


def positive_map(spans: Sequence[Sequence[Span]], covered: TokenSpans) -> np.ndarray:
    """Which tokens the phrases of N boxes have, bool (N, L).

    A phrase has all tokens from the one of its first character to that of its last. Where no token covers these, as
    with blanks, the next two characters are tried, to the right of the first and to the left of the last (official
    code). A phrase outside of the text, or cut off with it, has none.

    Args:
      spans: of each box its phrases, in characters of the text.
      covered: of the text.
    """
    found = np.zeros((len(spans), len(covered.tokens)), bool)
    for row, phrases in zip(found, spans, strict=True):
        for first, end in phrases:
            begin = _token(covered, range(first, first + REACH + 1), 0)
            last = _token(covered, range(end - 1, end - 2 - REACH, -1), -1)
            if begin is not None and last is not None:
                row[begin : last + 1] = True
    return found


def _token(covered: TokenSpans, places: range, which: int) -> int | None:
    """The first (0) or last (-1) token that covers the first of the characters that any covers."""
    for place in places:
        tokens = np.flatnonzero((covered.start <= place) & (place < covered.end))
        if len(tokens):
            return int(tokens[which])
    return None


def shares(positive_NL: np.ndarray) -> np.ndarray:
    """Positive maps with the rows' ones as 1 / (n + 1e-6), float32 (N, L): the official code's numbers."""
    positive = positive_NL.astype(np.float32)
    return positive / (positive.sum(axis=-1, keepdims=True, dtype=np.float32) + np.float32(1e-6))


def class_weights(positive_KL: np.ndarray, classes: Sequence[int], count: int) -> np.ndarray:
    """Weights (L, count) float32 by which scores of tokens become scores of classes: the mean over a class's tokens.

    Zeros in the column of a class without tokens; where it is above zero the token is of the class.

    Args:
      positive_KL: tokens of the K classes of a prompt.
      classes: the column of each.
      count: number of columns.
    """
    weights = np.zeros((positive_KL.shape[1], count), np.float32)
    for row, label in zip(positive_KL, classes, strict=True):
        weights[row, label] = 1 / max(1, row.sum())
    return weights
