"""Labels of evaluations and the classes' names.

An example without a label (-1) is of no class, and a class that training lacks is never right.
"""

from collections.abc import Iterator

import numpy as np

from capvl import terminal
from capvl.data.reading import sources
from capvl.errors import UserError
from capvl.evals import Context
from capvl.lines import read_lines


def open_labelled(context: Context, name: str, split: str) -> tuple[sources.Source | sources.Subset, np.ndarray]:
    """The examples of a split that have a label, with what the model looks at, and their labels.

    Raises:
      UserError: see `capvl.data.reading.sources.open_source`; or none has a label.
    """
    directory = context.data.directory()
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


def class_names(path: str, source, labels: np.ndarray) -> list[str]:
    """Names by label: of a file, of the data set's description, or of its `class_name` feature.

    Args:
      path: a file of names in the labels' order; "" for the data set's own.
      source: the opened data set.
      labels: labels of all its examples.

    Raises:
      UserError: there are none, fewer than labels, or the same one twice.
    """
    names = read_lines(path, "class names") if path else source.label_names() or _names_of_records(source, labels)
    names = [name.replace("_", " ").strip() for name in names]
    folded = [name.casefold() for name in names]
    twice = [name for i, name in enumerate(names) if folded[i] in folded[:i]]
    if twice:
        where = f" in {path!r}" if path else ""
        raise UserError(f"The class name {twice[0]!r} is there twice{where}; names must differ.")
    if labels.max(initial=0) >= len(names) or labels.min(initial=0) < 0:
        raise UserError(
            f"Data set {source.name!r} has labels {labels.min()} to {labels.max()}, "
            f"but there are {len(names)} class names."
        )
    return names


def _names_of_records(source, labels: np.ndarray) -> list[str]:
    names = {}
    for i, label in enumerate(labels):
        if int(label) not in names:
            names[int(label)] = sources.as_text(source.read(i, ("class_name",))["class_name"])
    missing = [i for i in range(int(labels.max(initial=0)) + 1) if not names.get(i)]
    if missing:
        raise UserError(
            f"Data set {source.name!r} has no name for label {missing[0]}; give a file of class names, one a line."
        )
    return [names[i] for i in range(len(names))]
