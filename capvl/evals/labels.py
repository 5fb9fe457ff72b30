"""Labels of evaluations: an example without one (-1) is of no class, and a class that training lacks is never right."""

from collections.abc import Iterator

import numpy as np

from capvl import terminal
from capvl.data.reading import sources
from capvl.errors import UserError
from capvl.evals import Context


def open_labelled(context: Context, name: str, split: str) -> tuple[sources.Source | sources.Subset, np.ndarray]:
    """The examples of a split that have a label, with what the model looks at, and their labels.

    Raises:
      UserError: see `capvl.data.reading.sources.open_source`; or none has a label.
    """
    directory = context.recipe.data.directory()
    source = sources.open_source(name, split, directory, features=(context.visual, "label"))
    labels = sources.labels(name, split, directory)
    kept = np.flatnonzero(labels >= 0)
    if not len(kept):
        raise UserError(f"No example of data set {name!r} has a label in its split {split!r}.")
    if len(kept) == len(labels):
        return source, labels
    terminal.say(f"{len(labels) - len(kept)} of {len(labels)} examples of {name} {split!r} have no label: left out.")
    return sources.Subset(source, kept), labels[kept]


def chance(labels: np.ndarray) -> float:
    """The share of the largest class."""
    return float(np.bincount(labels).max() / len(labels))


def untrained(labels: np.ndarray, classes: np.ndarray) -> Iterator[tuple[str, float]]:
    """(`untrained`, the share of test labels whose class training lacks: counted as wrong), where there are any."""
    share = float((~np.isin(labels, classes)).mean())
    if share:
        yield "untrained", share
