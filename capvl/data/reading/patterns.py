"""Patterns of shards -> files: *, ? and [0-9], braces {000..123} and {a,b}, in a folder or a bucket."""

import glob
import os
import re
from collections.abc import Iterator

from etils import epath

from capvl import storage
from capvl.errors import UserError

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MAGIC = re.compile(r"[*?\[]")


def expand(pattern: str) -> list[str]:
    """Files of a pattern, each once; those of a glob sorted, those of braces in the order in which they are written,
    inner ones first.

    A file that is there by the very name that was given is itself, whatever signs its name has in it, and so is every
    folder on the way. Names out of braces that are not there stay, so that missing shards are noticed by who reads.

    Raises:
      UserError: there are none, it is a folder, or the bucket needs a package.
    """
    pattern = os.path.expanduser(pattern)
    if re.match(r"\w+://", pattern) or "://" not in pattern:  # Else whole paths stand in its braces.
        path = storage.folder(pattern)
        if path.is_dir():
            raise UserError(f"{pattern!r} is a folder; name its files, such as {str(path / '*.tar')!r}.")
        if path.exists():
            return [pattern]
    alternatives = list(dict.fromkeys(_alternatives(pattern)))
    for one in alternatives:
        storage.folder(one)  # Is it one that can be read?
    files, found = [], False
    for one in alternatives:
        matches = _matches(one) if _MAGIC.search(one) else []
        found = found or bool(matches)
        files += matches or [one]
    if not found and not any(epath.Path(file).exists() for file in files):
        raise UserError(f"No file matches {pattern!r}.")
    return list(dict.fromkeys(files))


def _alternatives(pattern: str) -> Iterator[str]:
    """A pattern without its braces, as a shell expands them; braces around anything else are plain signs."""
    braces = _BRACES.search(pattern)
    if not braces:
        yield pattern
        return
    first, last, names = braces.groups()
    if names is None:
        low, high = int(first), int(last)
        numbers = range(low, high + 1) if low <= high else range(low, high - 1, -1)
        parts = (str(number).zfill(len(first)) for number in numbers)
    else:
        parts = iter(names.split(","))
    for part in parts:
        yield from _alternatives(pattern[: braces.start()] + part + pattern[braces.end() :])


def _matches(pattern: str) -> list[str]:
    """Files of a glob. Folders that are there by the name as it stands are no globs; brackets mean one of the signs in
    them only where nothing has the brackets themselves in its name."""
    if epath.Path(pattern).exists():
        return [pattern]
    parts = pattern.split("/")
    plain = 0
    while not _MAGIC.search(parts[plain]) or epath.Path("/".join(parts[: plain + 1])).exists():
        plain += 1
    for signs in ([part.replace("[", "[[]") for part in parts[plain:]], parts[plain:]):
        if files := _glob(parts[:plain], signs):
            return files
    return []


def _glob(folder: list[str], pattern: list[str]) -> list[str]:
    """Visible files below a folder, sorted; both in their parts."""
    base = "/".join(folder)
    if "://" in base:
        files = [str(path) for path in epath.Path(base).glob("/".join(pattern))]
    else:
        whole = "/".join([*map(glob.escape, folder), *pattern])
        files = [file for file in glob.glob(whole, recursive=True) if not os.path.isdir(file)]
    return sorted(file for file in files if not os.path.basename(file).startswith("."))


def below(files: list[str]) -> list[str]:
    """Files' names below the folder that they have in common; whole where they have none, as in several buckets."""
    try:
        common = os.path.commonpath([os.path.dirname(file) for file in files])
        return [os.path.relpath(file, common) for file in files]
    except ValueError:
        return files
