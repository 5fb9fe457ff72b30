"""What a run trains on, told by the contents of its files, so that other data under the same name is noticed.

Where files lie and when they were written plays no part: data that was moved, or made again and is the same, passes.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from capvl import storage
from capvl.data import sources
from capvl.data.loader import DataOptions
from capvl.data.patterns import expand
from capvl.errors import UserError

FILES = 256
"""Of more files, so many are looked at, spread evenly."""
BYTES = 2**26
"""Of more bytes in these, so many are read, in blocks spread evenly."""
BLOCK = 2**16


def fingerprint(options: DataOptions) -> dict[str, Any]:
    """Of every data set of a recipe: how many files and examples, and size and digest of files, as plain values.

    Raises:
      UserError: a data set isn't there or can't be read.
    """
    found = {"class_names": _digest(repr(fields.names).encode())} if (fields := options.fields()) else {}
    if options.name.startswith("stream:"):
        files = expand(options.name[len("stream:") :])
        common = os.path.commonpath([os.path.dirname(file) for file in files])
        return found | {options.name: _files({os.path.relpath(file, common): file for file in files})}
    for name, _ in options.parts():
        folder = pathlib.Path(sources.find(name, options.directory()))
        shards = _shards(folder, options.split)
        entry = _files({file.name: str(file) for file in (*shards, *sorted(folder.glob("*.labels.txt")))})
        found[name] = entry | {"examples": sources.count(str(folder), options.split)}
    return found


def _shards(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """Files of the splits that a tfds split such as "train[:90%]+val" is made of."""
    names = [re.sub(r"\[.*", "", part).strip() for part in split.split("+")]
    return sorted(file for name in names for file in folder.glob(f"*-{name}.*-of-*"))


def _files(files: dict[str, str]) -> dict[str, Any]:
    """How many there are, and [size, digest] of some by name; None for one that isn't there."""
    names = list(files)
    chosen = [names[i * len(names) // FILES] for i in range(FILES)] if len(names) > FILES else names
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(lambda name: storage.size(files[name]), chosen))
        whole = sum(filter(None, sizes)) <= BYTES
        each = None if whole else max(1, BYTES // len(chosen) // BLOCK)
        arguments = zip(chosen, sizes, strict=True)
        entries = pool.map(lambda pair: _entry(files[pair[0]], pair[1], each), arguments)
        return {"count": len(names), "files": dict(zip(chosen, entries, strict=True))}


def _entry(path: str, size: int | None, blocks: int | None) -> list | None:
    """[size, digest] of a file: of all of it, or of so many blocks."""
    if size is None:
        return None
    digest = hashlib.blake2b(digest_size=16)

    def read() -> None:
        with epath.Path(path).open("rb") as file:
            if blocks is None or size <= blocks * BLOCK:
                digest.update(file.read())
                return
            for i in range(blocks):
                file.seek(i * (size - BLOCK) // max(1, blocks - 1))
                digest.update(file.read(BLOCK))

    try:
        storage.retry(read, what=f"Reading {path!r}")
    except OSError as e:
        raise UserError(f"{path!r} can't be read: {storage.reason(e)}.") from e
    return [size, digest.hexdigest()]


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two fingerprints, in words.

    Returns:
      (changes of what is read, files that are gone): a shard of a stream that is gone is passed over.
    """
    changed, gone = [], []
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            changed.append(f"{name} is only {'here' if name in new else 'there'}")
        elif isinstance(old[name], str):
            changed += [f"{name} differ"] * (old[name] != new[name])
        else:
            _compare(name, old[name], new[name], changed, gone)
    return changed, gone


def _compare(name: str, old: dict, new: dict, changed: list[str], gone: list[str]) -> None:
    for what in ("examples", "count"):
        if old.get(what) != new.get(what):
            words = "examples" if what == "examples" else "files"
            changed.append(f"{name} has {new.get(what)} {words}, and had {old.get(what)}")
    for file in sorted(old["files"].keys() | new["files"].keys()):
        before, now = old["files"].get(file), new["files"].get(file)
        if before is not None and now is None and name.startswith("stream:"):
            gone.append(file)
        elif before != now and file in old["files"] and file in new["files"]:
            changed.append(f"{file} of {name} has other contents")
        elif before != now:
            changed.append(f"{file} of {name} is {'new' if file in new['files'] else 'gone'}")


def check(old: dict[str, Any] | None, new: dict[str, Any], consent: bool) -> Sequence[str]:
    """Compares a checkpoint's data with what is there now.

    Args:
      old: the checkpoint's fingerprint; None for one that has none.
      new: of now.
      consent: whether the user wants other data.

    Returns:
      What differs, where that is no error.

    Raises:
      UserError: the data is other than it was.
    """
    changed, gone = differences(old, new) if old is not None else ([], [])
    if changed and not consent:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"The data is not what this run was trained on so far ({'; '.join(changed[:3])}{more}); bring the old one "
            f"back, say --new_data to go on with this one, or choose another --workdir."
        )
    return [*changed, *(f"shard {file} is gone and passed over" for file in gone)]
