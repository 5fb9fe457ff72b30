"""Classes as numbers instead of words: the closed list of an ordinary detector, in the form of a prompt."""

from collections.abc import Sequence

import numpy as np

from capvl.data.text.category_prompts import Category, Prompt, categories
from capvl.errors import UserError


class ClosedList:
    """As `capvl.data.text.category_prompts.Vocabulary`: one prompt, whose token number k, from 1, is the k-th class.

    Attributes:
      categories: the classes.
      length: their number.
    """

    def __init__(self, values: Sequence[str | Category], length: int):
        """values: see `capvl.data.text.category_prompts.categories`.

        Raises:
          UserError: they are not as many as the model has.
        """
        self.categories, self.length = categories(values), length
        if len(self) != length:
            raise UserError(
                f"The model has a closed list of model.classes={length} classes, and the data {len(self)}; a model "
                "with a text encoder takes any."
            )

    def __len__(self) -> int:
        return len(self.categories)

    @property
    def numbers(self) -> dict[str, int]:
        """Number of each class by its name."""
        return {category.name: i for i, category in enumerate(self.categories)}

    def prompts(self, most: int = 0) -> list[Prompt]:
        """All classes in one; `most` is there for the interface."""
        count = len(self)
        tokens, names = np.arange(1, count + 1, dtype=np.int32), [category.name for category in self.categories]
        return [
            Prompt(", ".join(names), tokens, tuple(range(count)), ((0, 0),) * count, np.eye(count, dtype=bool), count)
        ]
