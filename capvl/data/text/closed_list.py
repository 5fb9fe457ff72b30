"""Classes as numbers instead of words: the closed list of an ordinary detector, in the form of a prompt."""

from collections.abc import Sequence

import numpy as np

from capvl.data.text.category_prompts import Category, Prompt, categories
from capvl.errors import UserError, nearest


class ClosedList:
    """As `capvl.data.text.category_prompts.Vocabulary`: one prompt, where k stands for the model's k-th class, from 1.

    Attributes:
      categories: the classes.
      length: of the prompt: number of the model's classes.
    """

    def __init__(self, values: Sequence[str | Category], known: Sequence[str]):
        """Finds classes by their names, whatever their order.

        Args:
          values: some of the model's classes; see `capvl.data.text.category_prompts.categories`.
          known: names of the model's.

        Raises:
          UserError: the model doesn't have one of them.
        """
        self.categories, self.length = categories(values), len(known)
        numbers = {name: k for k, name in enumerate(known, 1)}
        for category in self.categories:
            if category.name not in numbers:
                raise UserError(
                    f"The model has a closed list of {len(known)} classes, and {category.name!r} is none of them; a "
                    "model with a text encoder takes any." + nearest(category.name, known)
                )
        self._numbers = [numbers[category.name] for category in self.categories]

    def __len__(self) -> int:
        return len(self.categories)

    @property
    def numbers(self) -> dict[str, int]:
        """Number of each class by its name."""
        return {category.name: i for i, category in enumerate(self.categories)}

    def doubts(self) -> list[str]:
        """None: classes are numbers."""
        return []

    def prompts(self, most: int = 0) -> list[Prompt]:
        """All classes in one; `most` is there for the interface."""
        count, names = len(self), ", ".join(category.name for category in self.categories)
        tokens, positive = np.zeros(self.length, np.int32), np.eye(count, self.length, dtype=bool)
        tokens[:count] = self._numbers
        return [Prompt(names, tokens, tuple(range(count)), ((0, 0),) * count, positive, count)]
