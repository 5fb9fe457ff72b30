"""Several captions as one text: an image's own, and others as negatives (GLIP, arXiv 2112.03857, official code).

The captions of other images stand before and behind in random order, so that a phrase must be told from those of other
texts. The own caption stays whole.
"""

import dataclasses
from collections.abc import Sequence

from capvl.data.randomness import Uniforms
from capvl.data.text.spans import Span
from capvl.data.text.tokenizers import MAX_CHARACTERS, SubwordTokenizer, Tokenizer
from capvl.nn.padding import lengths

OTHERS, NONE, ALL = 20, 0.4, 0.5
"""Other captions at most; how often there is none; and how often, of the rest, there are so many (GLIP-L)."""
_ENDS = (".", "!", "?")


@dataclasses.dataclass(frozen=True)
class Packed:
    """A text with an image's caption among others.

    Attributes:
      text: all captions.
      own: first character and end of the image's.
      spans: of each box its phrases, in characters of the text.
      others: which of the captions offered are in it, in its order.
    """

    text: str
    own: Span
    spans: list[list[Span]]
    others: tuple[int, ...]


def draw_others(uniforms: Uniforms, most: int = OTHERS, none: float = NONE, all_: float = ALL) -> int:
    """How many other captions a text gets: none, else `most` or a number uniform in 1..most.

    Args:
      uniforms: random numbers.
      most: at most.
      none: how often there is none.
      all_: how often, of the rest, there are `most`.
    """
    if most < 1 or uniforms() < none:
        return 0
    return most if uniforms() < all_ else 1 + uniforms.below(most)


def pack(
    caption: str,
    spans: Sequence[Sequence[Span]],
    others: Sequence[str],
    tokenizer: Tokenizer | SubwordTokenizer,
    length: int,
    uniforms: Uniforms,
) -> Packed:
    """A caption among others, in random order, with the phrases' places moved.

    Others are taken one after another as long as there is room for all their tokens. One that says nothing, or the same
    as the caption or another, is left out.

    Args:
      caption: of the image.
      spans: of each box its phrases, in characters of the caption.
      others: captions of other images.
      tokenizer: of the text.
      length: tokens of the text, start and end included.
      uniforms: random numbers.
    """
    taken, said, used = [], {_plain(caption)}, _size(tokenizer, _sentence(caption), length)
    for i, other in enumerate(others):
        # The blank before is of the next one's first token, in byte-pair vocabularies.
        size = _size(tokenizer, f" {_sentence(other)}", length) - _size(tokenizer, "", length)
        if _plain(other) and _plain(other) not in said and used + size <= length:
            taken.append(i)
            said.add(_plain(other))
            used += size
    order = [-1, *taken]
    for i in range(len(order) - 1, 0, -1):
        j = uniforms.below(i + 1)
        order[i], order[j] = order[j], order[i]
    text, begins = _joined([caption if k < 0 else others[k] for k in order])
    while len(order) > 1 and (len(text) > MAX_CHARACTERS or _size(tokenizer, text, length) > length):
        order.remove(max(order))
        text, begins = _joined([caption if k < 0 else others[k] for k in order])
    begin = begins[order.index(-1)]
    moved = [[(first + begin, end + begin) for first, end in phrases] for phrases in spans]
    return Packed(text, (begin, begin + len(caption)), moved, tuple(k for k in order if k >= 0))


def _size(tokenizer: Tokenizer | SubwordTokenizer, text: str, length: int) -> int:
    """Number of tokens, ends included; no more than one above `length`."""
    return int(lengths(tokenizer(text, length + 1)))


def _sentence(text: str) -> str:
    """With a sign at its end."""
    return text if text.rstrip().endswith(_ENDS) else f"{text}."


def _plain(text: str) -> str:
    """For comparing."""
    return " ".join(text.lower().split()).rstrip(" .!?")


def _joined(texts: Sequence[str]) -> tuple[str, list[int]]:
    """The texts as sentences of one, and where each begins. A single one stays as it is."""
    if len(texts) == 1:
        return texts[0], [0]
    whole, begins = "", []
    for text in texts:
        begins.append(len(whole))
        whole += f"{_sentence(text)} "
    return whole.rstrip(), begins
