"""Questions about an image with all answers that people gave, each weighed by how many gave it (VQAv2)."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from capvl.data.examples import slots
from capvl.data.images.crops import Crop
from capvl.data.images.geometry import swap_sides
from capvl.data.randomness import Uniforms
from capvl.data.reading.texts import Question, questions


@dataclasses.dataclass(frozen=True)
class QuestionAnswers:
    """image (see `Crop`) and flip; of each of Q questions: question int32 (Q, P), answer int32 (Q, A, L), and weight
    float32 (Q, A): the share of the people who gave it, 0 for empty slots. In a flipped image "left" and "right" change
    places in what is asked and answered.

    Attributes:
      crop: how images become pixels.
      prompt: question -> its tokens, P at most.
      question_length: P.
      tokenizer: of the answers.
      length: L.
      questions: Q; drawn where an image has more that somebody answered.
      answers: A; the commonest where there are more, whose weights are then the shares among them.
      flip: whether half of the images are flipped (on the device).
      lone: the weight of an answer that is the only one given.
    """

    crop: Crop
    prompt: Callable[[str], np.ndarray]
    question_length: int
    tokenizer: Any
    length: int
    questions: int
    answers: int
    flip: bool
    lone: float = 1.0

    def __call__(self, example: dict, uniforms: Uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used."""
        flip = self.flip and uniforms() < 0.5
        answered = [row for row in questions(example.get("questions")) if row.answers]
        rows = [self._row(row, flip) for row in slots.choose(answered, self.questions, uniforms)]
        blank = {
            "question": np.zeros(self.question_length, np.int32),
            "answer": np.zeros((self.answers, self.length), np.int32),
            "weight": np.zeros(self.answers, np.float32),
        }
        filled = slots.fill(rows, self.questions, blank)
        del filled["slots"]  # The weights of an empty slot are 0.
        geometry = self.crop.draw(example, uniforms, flip=flip)
        image = self.crop.pixels(example, uniforms, geometry, flip_on_device=True)
        return filled | {"image": image, "flip": np.bool_(flip)}

    def _row(self, row: Question, flip: bool) -> dict[str, np.ndarray]:
        """The arrays of one question."""
        turned = swap_sides if flip else str
        prompt = self.prompt(turned(row.question))
        common = collections.Counter(row.answers).most_common(self.answers)
        said = sum(count for _, count in common)
        whole = self.lone if len(row.answers) == 1 else 1.0
        answer = np.zeros((self.answers, self.length), np.int32)
        weight = np.zeros(self.answers, np.float32)
        for i, (text, count) in enumerate(common):
            answer[i], weight[i] = self.tokenizer(turned(text), self.length), whole * count / said
        question = np.pad(prompt, (0, self.question_length - len(prompt))).astype(np.int32)
        return {"question": question, "answer": answer, "weight": weight}
