"""What a run trains on, told by the contents of its files, so that other data under the same name is noticed.

Where files lie and when they were written plays no part: data that was moved, or made again and is the same, passes.
"""

import concurrent.futures
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from etils import epath

from capvl import storage
from capvl.data.reading import sources
from capvl.data.reading.patterns import below, expand
from capvl.errors import UserError

FILES = 256
"""Of more files, so many are looked at, spread evenly."""
BYTES = 2**26
"""So many are read, as much of each file, in blocks spread evenly."""
BLOCK = 2**16


def fingerprint(options) -> dict[str, Any]:
    """Of every data set of a recipe: how many files and examples, and size and digest of files, as plain values.

    Raises:
      UserError: a data set isn't there or can't be read.
    """
    found = {"class_names": _digest(repr(fields.names).encode())} if (fields := options.fields()) else {}
    for kind in options.kinds().values():
        for name, _ in kind.parts():
            if name.startswith("stream:"):
                files = expand(name.removeprefix("stream:"))
                found[name] = _files(dict(zip(below(files), files, strict=True)))
                continue
            folder = pathlib.Path(sources.find(name, options.directory()))
            examples, shards = sources.contents(str(folder), options.split)
            files = [*shards, *map(str, sorted(folder.glob("*.labels.txt")))]
            found[name] = _files({os.path.relpath(file, folder): file for file in files}) | {"examples": examples}
    return found


def _files(files: dict[str, str]) -> dict[str, Any]:
    """How many there are, and [size, digest] of some by name; None for one that isn't there."""
    names = list(files)
    chosen = [names[i * len(names) // FILES] for i in range(FILES)] if len(names) > FILES else names
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(lambda name: storage.size(files[name]), chosen))
        each = max(1, BYTES // len(chosen) // BLOCK)  # Of each file by itself: another one may be gone next time.
        arguments = zip(chosen, sizes, strict=True)
        entries = pool.map(lambda pair: _entry(files[pair[0]], pair[1], each), arguments)
        return {"count": len(names), "files": dict(zip(chosen, entries, strict=True))}


def _entry(path: str, size: int | None, blocks: int) -> list | None:
    """[size, digest] of a file: of so many blocks, or of all of it where it has no more."""
    if size is None:
        return None
    digest = hashlib.blake2b(digest_size=16)

    def read() -> None:
        with epath.Path(path).open("rb") as file:
            if size <= blocks * BLOCK:
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
    if old["count"] != new["count"]:  # Other files, and other parts of them, were read then.
        return
    for file in sorted(old["files"].keys() | new["files"].keys()):
        before, now = old["files"].get(file), new["files"].get(file)
        if before is not None and now is None and file in new["files"] and name.startswith("stream:"):
            gone.append(file)
        elif before != now:
            how = "is gone" if now is None else "is new" if before is None else "has other contents"
            changed.append(f"{file} of {name} {how}")


def with_gone(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The new fingerprint with what the old one knew of shards that are gone, so that they may come back."""
    kept = {}
    for name, entry in new.items():
        before = (old or {}).get(name)
        if isinstance(entry, dict) and before and before["count"] == entry["count"]:
            files = {f: before["files"].get(f) if value is None else value for f, value in entry["files"].items()}
            entry = entry | {"files": files}
        kept[name] = entry
    return kept


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
