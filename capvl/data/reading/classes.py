"""The closed list of classes of a data set, and what its annotations say of each."""

import dataclasses
from typing import Any

from capvl import storage
from capvl.data.reading.decoders import class_names

CLASSES = "classes.json"
"""Beside a data set: a row for each class, in the order of the labels."""


@dataclasses.dataclass(frozen=True)
class Category:
    """A class.

    Attributes:
      name: its name, as records have it.
      id: what its annotations call it, a number as text ("90", with holes, from 0 or 1 on) or a code; "" where they
        don't say, or several files say different things.
      frequency: LVIS' "r", "c" or "f": in how many training images it is; "" where it isn't said.
      definition: what it is, in a sentence or two; "" where it isn't said.
      synonyms: other names.
    """

    name: str
    id: str = ""
    frequency: str = ""
    definition: str = ""
    synonyms: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        """What is known beside the name."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v and k != "name"}


def categories(source: Any) -> list[Category]:
    """The classes that boxes of a prepared data set have, by label; [] where there is no closed list.

    Args:
      source: of `capvl.data.reading.sources.open_source`.
    """
    names = class_names(source.info.features)
    folder = getattr(source.info, "data_dir", "")
    file = storage.folder(str(folder)) / CLASSES if folder else None
    if not names or file is None or not file.exists():
        return [Category(name) for name in names]
    told = {row.pop("name"): row for row in storage.read_json(file)}
    return [_category(name, told.get(name, {})) for name in names]


def _category(name: str, told: dict[str, Any]) -> Category:
    texts = {key: told[key] for key in ("id", "frequency", "definition") if isinstance(told.get(key), str)}
    synonyms = told.get("synonyms")
    synonyms = [own for own in synonyms if isinstance(own, str)] if isinstance(synonyms, list) else []
    return Category(name, **texts, synonyms=tuple(synonyms))
