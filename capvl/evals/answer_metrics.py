"""How well short texts answer: VQA accuracy, ANLS, exact match, word accuracy."""

import functools
import importlib.resources
import re
import string
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation, single spaces."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def exact(text: str, answers: Sequence[str]) -> float:
    """1 where the text is one of the answers, but for case, punctuation and spaces; nothing written is never right."""
    return float(bool(text.strip()) and any(_same(text, answer) for answer in answers))


def _same(text: str, answer: str) -> bool:
    """Equal when normalised; where that leaves nothing, as of "?" and "!", equal as they stand."""
    ours, theirs = normalize(text), normalize(answer)
    return ours == theirs if ours or theirs else text.strip() == answer.strip()


def contains(text: str, answers: Sequence[str]) -> float:
    """1 where an answer stands in the text as whole words (GIT, section 4.4)."""
    padded = f" {normalize(text)} "
    return float(any(f" {bare} " in padded for answer in answers if (bare := normalize(answer))))


def word(text: str, answers: Sequence[str]) -> float:
    """1 where letters and digits, of which there must be some, are the same whatever their case: the word accuracy of
    scene-text recognition."""

    def bare(value: str) -> str:
        return "".join(c for c in value.lower() if c.isascii() and c.isalnum())

    return float(bool(bare(text)) and any(bare(text) == bare(answer) for answer in answers))


def anls(text: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (arXiv 1905.13648, equation 1): the best answer's, 0 below a half."""
    best = 0.0
    for answer in answers:
        ours, theirs = (" ".join(t.lower().split()) for t in (text, answer))
        longest = max(len(ours), len(theirs))
        distance = edit_distance(ours, theirs) / longest if longest else 0.0
        best = max(best, 1 - distance if distance < 0.5 else 0.0)
    return best


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of characters that make one of the other (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def vqa(text: str, answers: Sequence[str]) -> float:
    """VQA accuracy (arXiv 1505.00468, section 4) of an answer, beside those of usually ten people.

    The mean over people of min(matches among the others / 3, 1). Texts are normalised as the official evaluation does
    where the people don't all say the same; one person's answer is compared as it is.
    """
    answers = [_one_line(a) for a in answers]
    text = _one_line(text)
    if len(set(answers)) > 1:
        answers, text = [vqa_normalize(a) for a in answers], vqa_normalize(text)
    if len(answers) < 2:
        return float(text in answers)
    shares = []
    for i in range(len(answers)):
        matches = sum(text == other for j, other in enumerate(answers) if j != i)
        shares.append(min(matches / 3, 1.0))
    return sum(shares) / len(shares)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


_NUMBERS = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6", seven="7", eight="8")
_NUMBERS |= dict(nine="9", ten="10")
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def vqa_normalize(text: str) -> str:
    """A text as the official VQA evaluation compares it: no marks, no articles, numbers as digits, don't for dont."""
    had_comma = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _MARKS:
        # A mark beside a space, or in a text with a number such as 1,000, goes; another one becomes a space.
        alone = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if alone or had_comma else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = (_NUMBERS.get(w, w) for w in out.lower().split())
    return " ".join(_contractions().get(w, w) for w in words if w not in _ARTICLES)


@functools.cache
def _contractions() -> dict[str, str]:
    """Words that lack one of their apostrophes, and the words; as in the official table, "somebody'd" loses its own."""
    words = importlib.resources.files("capvl.evals").joinpath("contractions.txt").read_text(encoding="utf-8").split()
    places = [(word, i) for word in words for i, letter in enumerate(word) if letter == "'"]
    return {word[:i] + word[i + 1 :]: word for word, i in places} | {"somebody'd": "somebodyd"}


METRICS = {"exact": exact, "contains": contains, "vqa": vqa, "anls": anls, "word": word}
