"""Which tokens of a text are masked for a model to tell them: whole words and skip-grams, as X-VLM's code has it.

As many as round(share * length), one at least, `most` at most; the length counts the start of the text. Places are
visited in random order. From each the word, or now and then an n-gram widened to whole words, is taken, until there
are enough; too many are cut at random. A taken token becomes the mask (80 %), any token (10 %) or stays (10 %), as in
BERT (arXiv 1810.04805, section 3.1).
"""

import dataclasses

import numpy as np

from capvl.data.randomness import Uniforms
from capvl.data.text.tokenizers import SubwordTokenizer, Tokenizer
from capvl.errors import UserError
from capvl.nn.padding import lengths

MASKS = ("[MASK]", "<mask>")
MASKED, RANDOM = 0.8, 0.1
_CONTINUES, _STARTS = ("##",), ("Ġ", "▁")


def continuations(pieces: list[str]) -> np.ndarray:
    """Which pieces continue the word of the piece before, bool: word pieces with "##", others without "Ġ" or "▁".

    The marker that most pieces bear is the vocabulary's.

    Raises:
      UserError: no piece bears one.
    """
    counts = {mark: sum(piece.startswith(mark) for piece in pieces) for mark in (*_CONTINUES, *_STARTS)}
    mark = max(counts, key=counts.get)
    if not counts[mark]:
        raise UserError(
            'Whole words can\'t be masked: no piece of the vocabulary begins with "##", "Ġ" or "▁", which tell where '
            "words begin; say whole_words=False."
        )
    return np.array([piece.startswith(mark) == (mark in _CONTINUES) for piece in pieces])


@dataclasses.dataclass(frozen=True, eq=False)
class Masking:
    """Masks texts; `for_tokenizer` makes one.

    Attributes:
      mask: id of the mask token.
      vocab: number of ids.
      start, end: ids that a text may begin and end with, which are never masked; an end doesn't count as length.
      continues: bool (vocab,), the ids that continue a word; None masks pieces rather than words.
      most: masked tokens of a text.
      share: of its tokens that are masked.
      skip_gram: probability that an n-gram is masked.
      skip_gram_most: its longest, in pieces before it is widened; the shortest has 2.
    """

    mask: int
    vocab: int
    start: int | None
    end: int
    continues: np.ndarray | None
    most: int = 8
    share: float = 0.25
    skip_gram: float = 0.2
    skip_gram_most: int = 3

    def __post_init__(self):
        if not 0 < self.mask < self.vocab:
            raise UserError(f"The mask's id should be in 1..{self.vocab - 1}, not {self.mask}.")
        if self.most < 1 or not 0 < self.share <= 1:
            raise UserError(f"Of a text's tokens, a share of {self.share} and at most {self.most} can't be masked.")
        if not 0 <= self.skip_gram <= 1 or self.skip_gram_most < 2:
            raise UserError(
                f"A skip-gram should have 2 pieces or more, not {self.skip_gram_most}, and a probability in [0, 1], "
                f"not {self.skip_gram}."
            )

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: Tokenizer | SubwordTokenizer,
        *,
        mask_id: int | None = None,
        whole_words: bool = True,
        **options,
    ) -> "Masking":
        """The masking of a tokenizer's texts.

        Args:
          tokenizer: of the texts.
          mask_id: of the mask token, where the vocabulary names none; an id that no text has.
          whole_words: whether all pieces of a word are masked.
          **options: the other attributes.

        Raises:
          UserError: the vocabulary has no mask token, or doesn't tell where words begin.
        """
        known = (tokenizer.id_of(name) for name in MASKS)
        mask = mask_id if mask_id is not None else next((found for found in known if found is not None), None)
        if mask is None:
            raise UserError(
                f"Tokenizer {tokenizer.path!r} has no mask token ({' or '.join(MASKS)}): say the id that should stand "
                "for masked tokens, one that no text has (mask_id)."
            )
        pieces = tokenizer.pieces()
        continues = continuations(pieces) if whole_words else None
        return cls(mask, len(pieces), tokenizer.start_id, tokenizer.eos, continues, **options)

    def __call__(self, ids_L: np.ndarray, uniforms: Uniforms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks a text.

        Args:
          ids_L: int32 ids, with 0 behind the last.
          uniforms: random numbers.

        Returns:
          The text with tokens masked (L,), their positions (most,) and what stood there (most,), int32; unused
          places have position 0 and target -1.
        """
        n = int(lengths(ids_L))
        first = int(n > 0 and ids_L[0] == self.start)
        last = n - int(n > first and ids_L[n - 1] == self.end)
        taken = self._take(ids_L, first, last, uniforms)
        masked = np.array(ids_L, np.int32)
        positions, targets = np.zeros(self.most, np.int32), np.full(self.most, -1, np.int32)
        positions[: len(taken)], targets[: len(taken)] = taken, masked[taken]
        for place in taken:
            kind = uniforms()
            if kind < MASKED:
                masked[place] = self.mask
            elif kind < MASKED + RANDOM:
                masked[place] = 1 + uniforms.below(self.vocab - 1)  # A 0 at the end would be padding.
        return masked, positions, targets

    def _take(self, ids_L: np.ndarray, first: int, last: int, uniforms: Uniforms) -> list[int]:
        """The places in [first, last) that are masked, in rising order."""
        enough = min(self.most, max(1, round(self.share * last)))
        continues = [False] * last if self.continues is None else self.continues[ids_L[:last]].tolist()
        places, taken = list(range(first, last)), set()
        while places and len(taken) < enough:
            place = _draw(places, uniforms)
            if place in taken:
                continue
            size = 1
            if self.skip_gram and uniforms() < self.skip_gram:
                size = 2 + uniforms.below(self.skip_gram_most - 1)
            begin, end = place, min(place + size, last)
            while begin > first and continues[begin]:
                begin -= 1
            while end < last and continues[end]:
                end += 1
            taken.update(range(begin, end))
        taken = sorted(taken)
        while len(taken) > enough:
            _draw(taken, uniforms)
        return sorted(taken)


def _draw(values: list[int], uniforms: Uniforms) -> int:
    """Takes one of the values out, which changes the order of the others."""
    i = uniforms.below(len(values))
    values[i], values[-1] = values[-1], values[i]
    return values.pop()
