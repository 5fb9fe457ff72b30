"""Texts from files: the one rule for where lines end, and lists that a user can replace (class names, templates).

A line ends at "\\n" or "\\r\\n" and nowhere else: U+0085, U+2028, form feeds and lone carriage returns are characters.
Files are UTF-8; a byte order mark at their beginning is no text.
"""

import codecs
import json
import os
import pathlib
from typing import Any

from capvl.errors import UserError

_OTHERS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def split(text: str) -> list[str]:
    """The lines of a text, without their ends; what follows the last end is a line unless it is empty."""
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    return lines if lines[-1] else lines[:-1]


def read_text(path: str | os.PathLike, what: str) -> str:
    """A file's text as it stands, without a byte order mark.

    Args:
      path: of the file.
      what: it is, for the error.

    Raises:
      UserError: missing, unreadable, or not UTF-8.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except FileNotFoundError as e:
        raise UserError(f"{what} {os.fspath(path)!r} can't be read: it does not exist.") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{what} {os.fspath(path)!r} can't be read: {getattr(e, 'strerror', None) or e}.") from e
    for name, marks in _OTHERS.items():
        if data.startswith(marks) or (name == "UTF-16" and b"\0" in data[:2]):  # Also without its mark.
            raise UserError(f"{what} {os.fspath(path)!r} is {name}; save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{what} {os.fspath(path)!r} is not UTF-8 (byte {e.start}); save it as UTF-8.") from e


def parse_json(text: str) -> Any:
    """The value of JSON text.

    Raises:
      ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def read_json(path: str | os.PathLike, what: str) -> Any:
    """The value of a JSON file.

    Raises:
      UserError: see `read_text`; or it is no JSON.
    """
    text = read_text(path, what)
    try:
        return parse_json(text)
    except ValueError as e:
        raise UserError(f"{what} {os.fspath(path)!r} is not JSON: {e}.") from e


def read_lines(path: str, what: str) -> list[str]:
    """Texts of a .json list or of a text file with one a line; a text may begin with #, and blank lines are none.

    Raises:
      UserError: missing, unreadable, empty, or not such a file.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"The file {path!r} of {what} is missing; it should hold one a line, or a JSON list of texts.")
    if file.suffix == ".json":
        lines = read_json(path, f"The file of {what}")
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise UserError(f"The file {path!r} of {what} should be a JSON list of texts.")
    else:
        lines = [line.strip() for line in split(read_text(path, f"The file of {what}")) if line.strip()]
    if not lines or not all(line.strip() for line in lines):
        raise UserError(f"The file {path!r} of {what} has {'an empty text in it' if lines else 'nothing in it'}.")
    return lines
