"""Examples that serve several tasks by one text: a prompt, which is given, and a target, which is learned."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from capvl.data.images.crops import Crop
from capvl.data.reading.texts import questions
from capvl.errors import UserError, nearest

TASKS = ("caption", "classify", "answer")


def check_tasks(tasks: tuple[str, ...]) -> None:
    """Raises UserError where `objective.tasks` is empty or names a task that isn't known."""
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"objective.tasks: {task!r} is unknown." + nearest(task, TASKS))
    if not tasks:
        raise UserError("objective.tasks should name one task or more.")


# (task, question) -> tokens of the prompt, and whether it had to be cut.
Prompts = Callable[[str, str], tuple[np.ndarray, bool]]


@dataclasses.dataclass(frozen=True)
class TaskText:
    """image (see `Crop`), flip, text int32 (L,) of a prompt and its target, prompt int32: the tokens of the prompt,
    and cut: whether it was too long. Where an Example has no image, `has_image` is False and the image zero.

    Attributes:
      crop: how images become pixels.
      tasks: of TASKS; one that the Example has something for is drawn; one that is named twice, twice as often.
      prompts: makes prompts.
      tokenizer: of the targets.
      length: L.
      flip: whether half of the images are flipped (on the device).
      texts: 0 for one text; else so many of an image: text (T, L), prompt and cut (T,).
    """

    crop: Crop
    tasks: tuple[str, ...]
    prompts: Prompts
    tokenizer: Any
    length: int
    flip: bool = False
    texts: int = 0

    def __call__(self, example: dict, uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used, UserError where images stand for clips or the reverse."""
        flip = self.flip and uniforms() < 0.5
        drawn = [self.text(*chosen) for chosen in self._drawn(example, uniforms)]
        has_image = self.crop.feature in example
        if not has_image and ("image" in example or "frames" in example):
            has, reads = ("images", "clips") if "image" in example else ("clips", "images")
            raise UserError(f"The data set has {has}, and the model reads {reads} (model.frames={self.crop.frames}).")
        image = self.crop.blank()
        if has_image:
            geometry = self.crop.draw(example, uniforms, flip=flip)
            image = self.crop.pixels(example, uniforms, geometry, flip_on_device=True)
        text, prompt, cut = (np.stack(column) for column in zip(*drawn, strict=True))
        if not self.texts:
            text, prompt, cut = text[0], prompt[0], cut[0]
        return {
            "image": image,
            "flip": np.bool_(flip),
            "text": text,
            "prompt": prompt,
            "cut": cut,
            "has_image": np.bool_(has_image),
        }

    def _drawn(self, example: dict, uniforms):
        """(task, question, target) of every text: tasks by chance, the pairs of a task without return."""
        pairs = list(self._pairs(example))
        if not pairs:
            return [("", "", None)] * max(1, self.texts)
        left: dict[str, list] = {}
        rows = []
        for _ in range(max(1, self.texts)):
            task, candidates = pairs[uniforms.below(len(pairs))]
            pool = left.get(task) or list(candidates)
            rows.append((task, *pool.pop(uniforms.below(len(pool)))))
            left[task] = pool
        return rows

    def text(self, task: str, question: str, target: str | bytes | None) -> tuple[np.ndarray, np.int32, np.bool_]:
        """Tokens (L,), how many are the prompt's, and whether that was cut; all padding without a target."""
        if target is None:
            return np.zeros(self.length, np.int32), np.int32(0), np.bool_(False)
        prompt, cut = self.prompts(task, question)
        out = np.concatenate([prompt, self.tokenizer(target, self.length - len(prompt))])
        return out.astype(np.int32), np.int32(len(prompt)), np.bool_(cut)

    def _pairs(self, example: dict):
        """(task, its (question, target) pairs) of every task that the example serves, as often as it is named."""
        found = {
            "caption": [("", text) for text in example.get("text") or ()],
            "classify": [("", example["class_name"])] if example.get("class_name") else [],
            "answer": [(row.question, answer) for row in questions(example.get("questions")) for answer in row.answers],
        }
        for task in self.tasks:
            if found[task]:
                yield task, found[task]
