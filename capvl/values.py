"""Values of config keys: what a key's type makes of a file's value, or of what somebody typed."""

import ast
import math
import re
import types
import typing
from typing import Any

from capvl.errors import UserError

_SUFFIX = {"k": 1024, "K": 1024, "M": 1024**2}


def convert(value: Any, hint: Any, key: str) -> Any:
    """A value of a key as its type wants it.

    Args:
      value: of a config file, or `Typed`.
      hint: the type.
      key: its full name, for the error.

    Raises:
      UserError: it is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Typed):
        value = _meant(value, hint, key)
    if hint is Any:
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(key, "a list", value)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(convert(v, arguments[0], f"{key}[{i}]") for i, v in enumerate(value))
        if len(arguments) != len(value):
            raise _wrong(key, f"{len(arguments)} values", value)
        return tuple(convert(v, a, f"{key}[{i}]") for i, (v, a) in enumerate(zip(value, arguments, strict=True)))
    if hint is int and isinstance(value, str) and (m := re.fullmatch(r"(\d+)([kKM])", value)):
        return int(m[1]) * _SUFFIX[m[2]]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, int | float):
        raise UserError(f"{key} should be a text, not the number {value!r}; put it in quotes.")
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", dict: "a section"}
        raise _wrong(key, words.get(hint, hint.__name__), value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(key, "a finite number", value)
    return value


def _wrong(key: str, wanted: str, value: Any) -> UserError:
    if isinstance(value, tuple):
        value = tuple(parse(v) if isinstance(v, Typed) else v for v in value)
    return UserError(f"{key} should be {wanted}, not {value!r}.")


class Typed(str):
    """What somebody typed for a key. The key's type says what it means, so that 2017_01 and 1.10 stay texts where
    texts are wanted."""


def _meant(text: Typed, hint: Any, key: str) -> Any:
    """What a typed text means for a type; a tuple's parts stay typed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is str:
        return unquoted(text)
    if origin in (typing.Union, types.UnionType) and str in arguments:
        return None if text == "None" and types.NoneType in arguments else unquoted(text)
    if origin is typing.Literal:
        return next((a for a in arguments if str(a) == unquoted(text)), unquoted(text))
    parts = _parts(text)
    if origin is tuple and isinstance(parts, tuple):
        return parts
    if origin is list and arguments and isinstance(parts, tuple):
        return [convert(part, arguments[0], f"{key}[{i}]") for i, part in enumerate(parts)]
    if origin is dict and isinstance(parts, dict):
        return {convert(k, arguments[0], key): convert(v, arguments[1], key) for k, v in parts.items()}
    return parse(text)


def unquoted(text: str) -> str:
    """A text as it stands, or what stands in quotes."""
    value = parse(text) if text[:1] in ("'", '"') else text
    return str(value if isinstance(value, str) else text)


def _parts(text: str) -> tuple | dict | None:
    """The parts of a list, tuple or dict as they are typed."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None

    def source(part: ast.expr) -> Typed:
        return Typed(ast.get_source_segment(text.strip(), part))

    if isinstance(node, ast.Tuple | ast.List):
        return tuple(map(source, node.elts))
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {source(k): source(v) for k, v in zip(node.keys, node.values, strict=True)}
    return None


def parse(text: str) -> Any:
    """What a text stands for where no type says so."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return str(text)
