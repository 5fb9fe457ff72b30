"""Lists of classes as prompts: detection as grounding (GLIP, arXiv 2112.03857, section 3.1).

A prompt has the names of classes one after another, "person. bicycle. hair drier", and tells which tokens are whose.
A list that has more tokens than a text becomes several prompts, and no class is lost. In training a prompt has an
image's classes and others, drawn at random, in random order (its appendix; the official code's rule).

A class's part of a prompt is tokenized once. The tokens of a prompt are those parts in a row, which is what its whole
text has, since no tokenizer of ours joins two words to a token.

Letters: L tokens, K classes of a prompt, S boxes.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from capvl.data.randomness import Uniforms
from capvl.data.text.spans import Span, class_weights, positive_map
from capvl.data.text.tokenizers import MAX_CHARACTERS, SubwordTokenizer, Tokenizer
from capvl.errors import UserError, nearest
from capvl.nn.padding import lengths

SEPARATOR = ". "
DETECTION = "object detection : "
"""What the official code may write before the classes."""
NEGATIVES, FULL = 85, 0.5
"""Classes that a training prompt has beside the image's own, and how often it has so many (official configs)."""
_UNKNOWN = ("[UNK]", "<unk>")


def clean_name(name: str) -> str:
    """The name of a class as the official code cleans it: without what stands in brackets, underscores as blanks, two
    blanks as one. Blanks at the ends stay; prompts drop them."""
    return re.sub(r"\(.*\)", "", name).replace("_", " ").replace("  ", " ")


@dataclasses.dataclass(frozen=True)
class Category:
    """A class and how a prompt says it: prefix, said, suffix, description. The label has the tokens of `said` alone.

    Attributes:
      name: by which the class is known.
      said: what the prompt calls it; "" for the name, cleaned.
      prefix, suffix: what stands before and behind that.
      description: what else there is to say; stands at the end, behind a comma.
    """

    name: str
    said: str = ""
    prefix: str = ""
    suffix: str = ""
    description: str = ""

    def in_words(self) -> tuple[str, Span]:
        """Its part of a prompt, and the characters of that which bear the label.

        Raises:
          UserError: there is nothing to say.
        """
        said = " ".join((self.said or clean_name(self.name)).split())
        if not said:
            raise UserError(f"Nothing is left of the class {self.name!r} once its name is cleaned; say it otherwise.")
        description = f", {self.description.strip()}" if self.description.strip() else ""
        before, behind = self.prefix.lstrip(), self.suffix.rstrip()
        before += " " if before[-1:].isalnum() else ""  # Two words stay two.
        whole = before + said + (" " if behind[:1].isalnum() else "") + behind + description
        return whole, (len(before), len(before) + len(said))


def categories(values: Sequence[str | Category | Mapping[str, str]]) -> tuple[Category, ...]:
    """Classes from their names, or from dicts of Category's attributes.

    Raises:
      UserError: there is none, one is named twice, or a value is no class.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise UserError(f'The classes should be a list such as ["cat", "dog"], not {values!r}.')
    found = tuple(_category(value) for value in values)
    if not found:
        raise UserError("The list of classes is empty; name at least one.")
    seen = set()
    for category in found:
        name = " ".join(category.name.split())
        if name in seen:
            raise UserError(f"The list of classes has {name!r} twice; name each class once.")
        seen.add(name)
    return found


def _category(value: Any) -> Category:
    if isinstance(value, Category):
        return value
    if isinstance(value, str):
        return Category(value)
    if not isinstance(value, Mapping) or "name" not in value:
        raise UserError(f'A class should be a name or a dict with "name", not {value!r}.')
    known = [field.name for field in dataclasses.fields(Category)]
    for key, text in value.items():
        if key not in known:
            raise UserError(f"The class {value['name']!r} has no {key!r}." + nearest(key, known))
        if not isinstance(text, str):
            raise UserError(f"{key!r} of the class {value['name']!r} should be a text, not {text!r}.")
    return Category(**value)


class _Part(NamedTuple):
    """A piece of a prompt: ids (n,), which of them bear the label (n,)."""

    ids: np.ndarray
    labelled: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One text with several classes.

    Attributes:
      text: as it is read.
      tokens: (L,) int32.
      classes: numbers of its K classes in the whole list, in the prompt's order.
      spans: of each class the characters of the text that bear its label.
      positive: (K, L) bool, the tokens of each class.
      count: number of classes in the whole list.
      alike: class -> those of the whole list that have its very tokens, itself among them, where others have.
    """

    text: str
    tokens: np.ndarray
    classes: tuple[int, ...]
    spans: tuple[Span, ...]
    positive: np.ndarray
    count: int
    alike: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def weights(self) -> np.ndarray:
        """(L, count) float32: see `capvl.data.text.spans.class_weights`; zeros for classes of other prompts."""
        return class_weights(self.positive, self.classes, self.count)

    def rows(self, labels: Sequence[int]) -> np.ndarray:
        """The tokens of S boxes by their classes' numbers, bool (S, L); none for a class that isn't in the prompt.

        Where two classes are said alike, as LVIS' "bow_(weapon)" and "bow_(decorative_ribbons)" are, a box has the
        tokens of both: no text that names it is wrong of it.
        """
        places = {label: k for k, label in enumerate(self.classes)}
        found = np.zeros((len(labels), len(self.tokens)), bool)
        for row, label in zip(found, labels, strict=True):
            for same in self.alike.get(label, (label,)):
                if same in places:
                    row |= self.positive[places[same]]
        return found


class Vocabulary:
    """A list of classes, tokenized.

    Attributes:
      categories: the classes.
      length: L.
      alike: groups of numbers of classes that have the same tokens, so that no model can tell them apart.
      unknown: numbers of classes with a token that stands for any unknown word.
    """

    def __init__(
        self,
        values: Sequence[str | Category | Mapping[str, str]],
        tokenizer: Tokenizer | SubwordTokenizer,
        length: int,
        *,
        prefix: str = "",
        separator: str = SEPARATOR,
    ):
        """Tokenizes the classes.

        Args:
          values: see `categories`.
          tokenizer: of the prompts.
          length: L, start and end of a prompt included.
          prefix: what stands before the classes, such as DETECTION.
          separator: what stands between two of them; ends with a blank.

        Raises:
          UserError: see `categories`; or a class has no token, or more than a whole prompt has room for.
        """
        if not separator.endswith(" "):
            raise UserError(f"What stands between two classes should end with a blank, not be {separator!r}.")
        self.categories = categories(values)
        self.length, self._tokenizer, self._stop = length, tokenizer, separator[:-1]
        self._separator, self._prefix = separator, f"{prefix.strip()} " if prefix.strip() else ""
        self._words = [category.in_words() for category in self.categories]
        self._parts: dict[tuple[int, bool, bool], _Part] = {}
        ends = tokenizer("", MAX_CHARACTERS)
        ends = ends[: int(lengths(ends))]
        self._start = [*ends[:-1].tolist(), *self._tokens(self._prefix.strip(), ()).ids.tolist()]
        self._room = length - len(self._start) - 1
        if self._room < 1:
            raise UserError(f"A prompt of {length} tokens has no room for classes behind {prefix.strip()[:60]!r}.")
        for i in range(len(self)):
            self._check(i)
        said = [self._part(i, False, True).ids.tobytes() for i in range(len(self))]
        groups: dict[bytes, list[int]] = {}
        for i, ids in enumerate(said):
            groups.setdefault(ids, []).append(i)
        self.alike = tuple(tuple(group) for group in groups.values() if len(group) > 1)
        self._alike = {i: group for group in self.alike for i in group}
        unknown = {tokenizer.id_of(piece) for piece in _UNKNOWN} - {None}
        self.unknown = tuple(i for i in range(len(self)) if unknown & set(self._part(i, False, True).ids.tolist()))

    def __len__(self) -> int:
        return len(self.categories)

    @property
    def numbers(self) -> dict[str, int]:
        """Number of each class by its name."""
        return {category.name: i for i, category in enumerate(self.categories)}

    def doubts(self) -> list[str]:
        """Sentences on classes that no model can tell apart, or that it knows only as unknown words."""
        names = [category.name for category in self.categories]
        said = [f"{' and '.join(repr(names[i]) for i in group)} are the same in a prompt." for group in self.alike[:3]]
        if len(self.alike) > 3:
            said.append(f"So are {len(self.alike) - 3} more groups of classes.")
        if self.unknown:
            first, count = repr(names[self.unknown[0]]), len(self.unknown)
            more = f" and {count - 1} more" if count > 1 else ""
            said.append(f"The tokenizer doesn't know all words of {first}{more}.")
        return said

    def _tokens(self, text: str, labelled: Sequence[Span]) -> _Part:
        """Tokens of a text, without start and end; one more than there could be room for."""
        covered = self._tokenizer.spans(text, self.length + 4)
        own = covered.start >= 0
        return _Part(covered.tokens[own], positive_map([labelled], covered)[0][own])

    def _part(self, i: int, first: bool, last: bool) -> _Part:
        """The tokens of a class where it is the first of a text, or the last."""
        key = i, first, last
        if key not in self._parts:
            words, (begin, end) = self._words[i]
            blank = "" if first else " "  # Byte-pair pieces have it.
            text = f"{blank}{words}{'' if last else self._stop}"
            self._parts[key] = self._tokens(text, [(begin + len(blank), end + len(blank))])
        return self._parts[key]

    def _check(self, i: int) -> None:
        name, part = self.categories[i].name, self._part(i, not self._prefix, True)
        # First: of a name that is cut no token is labelled.
        if len(part.ids) > self._room or len(self._words[i][0]) > MAX_CHARACTERS - 8:
            raise UserError(
                f"The class {name[:60]!r} has more than the {self._room} tokens that a prompt of {self.length} "
                "has room for; say it shorter."
            )
        if not part.labelled.any():
            raise UserError(f"The tokenizer has no token for the class {name!r}; say it otherwise.")

    def prompts(self, most: int = 0) -> list[Prompt]:
        """All classes in their order, in as few prompts as hold them.

        Args:
          most: classes of a prompt at most; 0 for as many as there is room for. 1 reads each alone.
        """
        groups, used = [[]], 0
        for i in range(len(self)):
            first = not groups[-1] and not self._prefix
            if groups[-1] and (len(groups[-1]) == most or used + len(self._part(i, first, True).ids) > self._room):
                groups.append([])
                first, used = not self._prefix, 0
            groups[-1].append(i)
            used += len(self._part(i, first, False).ids)
        return [self.prompt(group) for group in groups]

    def prompt(self, classes: Sequence[int]) -> Prompt:
        """The prompt of some classes in an order.

        Raises:
          UserError: it has more tokens than there is room for.
        """
        ids, text, spans = list(self._start), self._prefix, []
        positive = np.zeros((len(classes), self.length), bool)
        for k, i in enumerate(classes):
            last = k == len(classes) - 1
            part = self._part(i, not k and not self._prefix, last)
            if len(ids) + len(part.ids) >= self.length:
                raise UserError(f"A prompt of {self.length} tokens has no room for {len(classes)} of the classes.")
            positive[k, len(ids) : len(ids) + len(part.ids)] = part.labelled
            words, (begin, end) = self._words[i]
            spans.append((len(text) + begin, len(text) + end))
            text += words if last else words + self._separator
            ids.extend(part.ids.tolist())
        tokens = np.zeros(self.length, np.int32)
        tokens[: len(ids) + 1] = [*ids, self._tokenizer.eos]
        return Prompt(text, tokens, tuple(classes), tuple(spans), positive, len(self), self._alike)

    def fitting(self, classes: Sequence[int], used: int = 0) -> tuple[list[int], int]:
        """Of classes those that there is room for in a prompt, whichever their order, one after another.

        Args:
          classes: their numbers.
          used: tokens that others have.

        Returns:
          The classes, and how many tokens they and the others have.
        """
        kept = []
        for i in classes:
            size = max(len(self._part(i, first, False).ids) for first in (False, not self._prefix))
            if used + size <= self._room:
                kept.append(i)
                used += size
        return kept, used


def sampled_prompt(
    positives: Sequence[int],
    vocabulary: Vocabulary,
    uniforms: Uniforms,
    *,
    negatives: int = NEGATIVES,
    full: float = FULL,
    among: Sequence[int] | None = None,
    without: Collection[int] = (),
) -> tuple[Prompt, tuple[int, ...]]:
    """A training prompt of an image: its classes and others, drawn without replacement, in random order.

    Args:
      positives: numbers of the classes that the image has; each counts once.
      vocabulary: of the classes.
      uniforms: random numbers.
      negatives: other classes at most; as many as there is room for.
      full: how often there are so many; else their number is uniform in 1..negatives.
      among: classes that others are drawn from; None for all. Of federated data sets those that were looked for and
        aren't there (LVIS, OpenImages): of all others nobody knows.
      without: classes that others are not drawn from.

    Returns:
      The prompt; and the positives that it had no room for.
    """
    own = sorted(set(positives))
    if own and not 0 <= own[0] <= own[-1] < len(vocabulary):
        raise ValueError(f"Classes {own} of {len(vocabulary)}.")
    barred = sorted({*own, *without})
    pool = None if among is None else [i for i in dict.fromkeys(among) if i not in barred]
    most = min(negatives, len(vocabulary) - len(barred) if pool is None else len(pool))
    asked = min(most, most if uniforms() < full else 1 + uniforms.below(max(1, most)))
    kept, used = vocabulary.fitting(_shuffled(own, uniforms))
    drawn = _others(barred, len(vocabulary), asked, uniforms) if pool is None else _shuffled(pool, uniforms)[:asked]
    others, _ = vocabulary.fitting(drawn, used)
    dropped = tuple(sorted(set(own) - set(kept)))
    return vocabulary.prompt(_shuffled(kept + others, uniforms)), dropped


def _shuffled(values: Sequence[int], uniforms: Uniforms) -> list[int]:
    """In random order (Fisher and Yates)."""
    values = list(values)
    for i in range(len(values) - 1, 0, -1):
        j = uniforms.below(i + 1)
        values[i], values[j] = values[j], values[i]
    return values


def _others(barred: list[int], count: int, asked: int, uniforms: Uniforms) -> list[int]:
    """So many of 0..count-1, none twice and none of `barred` (in rising order), without listing all of them."""
    moved: dict[int, int] = {}
    free, found = count - len(barred), []
    for n in range(asked):
        last = free - 1 - n
        i = uniforms.below(last + 1)
        found.append(moved.get(i, i))
        moved[i] = moved.get(last, last)
    for k, value in enumerate(found):
        for class_ in barred:
            value += value >= class_
        found[k] = value
    return found
