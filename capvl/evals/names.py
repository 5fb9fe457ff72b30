"""Class names and prompt templates from files that a user can replace."""

import importlib.resources

import numpy as np

from capvl.data.reading import sources
from capvl.errors import UserError
from capvl.lines import read_lines


def read_templates(path: str) -> list[str]:
    """Prompt templates; each has {} where the class name goes. "" is the package's own list.

    Raises:
      UserError: see `read_lines`; or a template has no {}.
    """
    if not path:
        file = importlib.resources.files("capvl.evals").joinpath("prompts.txt")
        with importlib.resources.as_file(file) as local:
            return read_templates(str(local))
    templates = read_lines(path, "prompt templates")
    wrong = [t for t in templates if t.count("{}") != 1]
    if wrong:
        raise UserError(f"Template {wrong[0]!r} of {path!r} should have {{}} once, where the class name goes.")
    return templates


def class_names(path: str, source, directory_labels: np.ndarray) -> list[str]:
    """Names by label: of a file, of the data set's description, or of its `class_name` feature.

    Args:
      path: a file of names in the labels' order; "" for the data set's own.
      source: the opened data set.
      directory_labels: labels of all its examples.

    Raises:
      UserError: there are none, fewer than labels, or the same one twice.
    """
    names = (
        read_lines(path, "class names") if path else source.label_names() or _names_of_records(source, directory_labels)
    )
    names = [name.replace("_", " ").strip() for name in names]
    seen = set()
    for name in names:
        if name.casefold() in seen:
            raise UserError(
                f"The class name {name!r} is there twice{f' in {path!r}' if path else ''}; names must differ."
            )
        seen.add(name.casefold())
    if directory_labels.max(initial=0) >= len(names) or directory_labels.min(initial=0) < 0:
        raise UserError(
            f"Data set {source.name!r} has labels {directory_labels.min()} to {directory_labels.max()}, "
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
