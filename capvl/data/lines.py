"""Texts from files that a user can replace: class names, templates, answers."""

import json
import pathlib

from capvl.errors import UserError


def read_lines(path: str, what: str) -> list[str]:
    """Texts of a .json list or of a text file with one a line.

    Raises:
      UserError: missing, unreadable, empty, or not such a file.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"The file {path!r} of {what} is missing; it should hold one a line, or a JSON list of texts.")
    try:
        text = file.read_text(encoding="utf-8")
        lines = json.loads(text) if file.suffix == ".json" else text.splitlines()
    except (ValueError, OSError) as e:
        raise UserError(f"The file {path!r} of {what} can't be read: {e}") from e
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"The file {path!r} of {what} should be a JSON list of texts.")
    if file.suffix != ".json":
        lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not lines or not all(line.strip() for line in lines):
        raise UserError(f"The file {path!r} of {what} has {'an empty text in it' if lines else 'nothing in it'}.")
    return lines
