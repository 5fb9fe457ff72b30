"""Plain values from config files and flags, checked against dataclasses; every unknown key and wrong type is named.

A config file has `get_config()` that returns an ml_collections.ConfigDict of plain values. What sections there are,
and which dataclasses they are checked against, is not known here (`capvl.recipes`).
"""

import dataclasses
import importlib.util
import pathlib
import sys
import types
import typing
from collections.abc import Collection
from typing import Any

from capvl.errors import UserError, nearest
from capvl.values import Typed, convert, parse, unquoted

Trust = bool | Collection[str]
"""Whether "module:Class" in a recipe may be imported: all, none, or these names."""


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    out = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def build(cls: type, values: Any, where: str, given: dict | None = None) -> Any:
    """A dataclass from plain values.

    Raises:
      UserError: an unknown key or a value of the wrong type, by its full name.
    """
    dot, values = where + "." if where else "", section(values, where or "config")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    known = [n for n in fields if n != "source" and n not in (given or {})]
    arguments = dict(given or {})
    for key, value in values.items():
        if key not in known:
            raise UserError(f"Unknown key {dot + key!r}." + nearest(key, [*known, *(given or {})]))
        arguments[key] = convert(value, hints[key], dot + key)
    for name in known:
        required = fields[name].default is dataclasses.MISSING and fields[name].default_factory is dataclasses.MISSING
        if name not in arguments and required:
            raise UserError(f"The config lacks {dot + name!r}.")
    return cls(**arguments)


def section(values: Any, where: str) -> dict:
    """A copy of a section's values.

    Raises:
      UserError: it is no section.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} should be a section of keys, not {values!r}.")
    return dict(values)


def set_key(values: dict, key: str, text: str, *, whole: bool = False) -> None:
    """Sets a dotted key of nested values to a text.

    Args:
      values: changed in place.
      key: of a value.
      text: which means what the key's type says (`capvl.values.Typed`).
      whole: the key is a section, and the text all of its values.

    Raises:
      UserError: there is no such section.
    """
    *sections, last = key.split(".")
    node = values
    for name in sections:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"Unknown key {key!r}: {name!r} is a value, not a section.")
    node[last] = parse(text) if whole else Typed(text)


def find_class(registry: dict[str, str], name: Any, key: str, trust: Trust) -> type:
    """The dataclass of a name, or of "module:Class" of the user's own where it is trusted.

    Raises:
      UserError: it is unknown, not trusted, or no dataclass.
    """
    name = unquoted(name) if isinstance(name, Typed) else name
    if not isinstance(name, str):
        raise UserError(f"{key} should be a name, not {name!r}." + nearest("", registry))
    if name not in registry and ":" not in name:
        raise UserError(f"{key}={name!r} is unknown." + nearest(name, registry))
    module, _, attribute = registry.get(name, name).partition(":")
    if name in registry:
        return getattr(importlib.import_module(module), attribute)
    if trust is not True and name not in (trust or ()):
        raise UserError(
            f"{key}={name!r} names code to import, and the folder may be somebody else's; where you trust it, say so "
            f"(--trust, or trust=True)."
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as e:  # Importing runs the user's code: whatever it raises is told in one line.
        raise UserError(f"{key}={name!r} can't be imported: {type(e).__name__}: {e}.") from e
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise UserError(f"{key}={name!r} is no dataclass, as objectives and evaluators are.")
    return found


def name_of(registry: dict[str, str], value: Any) -> str:
    """The name by which `find_class` finds a value's class."""
    target = f"{type(value).__module__}:{type(value).__qualname__}"
    return next((name for name, path in registry.items() if path == target), target)


def read_file(path: str) -> dict:
    """get_config() of a file as nested plain values; its neighbours can be imported by it.

    Raises:
      UserError: it is missing, or fails.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        known = [str(p) for p in (file.parent if file.parent.is_dir() else pathlib.Path("configs")).glob("*.py")]
        raise UserError(f"Config file {path!r} does not exist." + nearest(path, known))
    spec = importlib.util.spec_from_file_location(f"capvl_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        config = _get_config(module, path)
    except UserError:
        raise
    except Exception as e:  # A config is the user's code: whatever it raises is told in one line.
        raise UserError(f"Config file {path!r} fails: {type(e).__name__}: {e}") from e
    finally:
        sys.path.remove(str(file.parent.resolve()))
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _get_config(module: types.ModuleType, path: str) -> Any:
    if not hasattr(module, "get_config"):
        raise UserError(f"Config file {path!r} has no function get_config().")
    return module.get_config()
