"""How a model that writes is prompted: tokens that begin its text, by task.

Tasks are "caption", "classify" (write the class's name), "answer" (a question) and "read" (the words in the image).
The options of a model with a decoder have `prompt(tokenizer, task, text)`; an objective narrows it to what it trains.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from capvl.errors import UserError
from capvl.nn.padding import real


def caption_prompt(task: str) -> np.ndarray:
    """The empty prompt of a caption.

    Raises:
      UserError: another task.
    """
    if task != "caption":
        raise UserError(f"A model that was trained to caption doesn't know the task {task!r}.")
    return np.zeros(0, np.int32)


def check_task(task: str, known: Sequence[str]) -> None:
    """Raises UserError where a task is not among those that a model knows."""
    if task not in known:
        raise UserError(f"This model wasn't trained for the task {task!r}; it knows {', '.join(known)}.")


@dataclasses.dataclass(frozen=True)
class TextPrompts:
    """Prompts in words, without an end: the question, or a task's own words.

    Attributes:
      tokenizer: of the words.
      length: text positions L. A prompt takes `room` of them at most and is cut at its end: how a question begins
        says what is asked.
      words: task -> prompt where there is no question.
    """

    tokenizer: Any
    length: int
    words: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def room(self) -> int:
        """Most tokens of a prompt: a quarter of the positions stays for what is written."""
        return self.length - max(2, self.length // 4)

    def __call__(self, task: str, question: str) -> tuple[np.ndarray, bool]:
        """The prompt's tokens, and whether it was cut."""
        text = question or self.words.get(task, "")
        if not text.strip():
            return np.zeros(0, np.int32), False
        tokens = self.tokenizer(text, self.room + 2)
        tokens = tokens[real(tokens) & (tokens != self.tokenizer.eos)]
        return tokens[: self.room].astype(np.int32), len(tokens) > self.room
