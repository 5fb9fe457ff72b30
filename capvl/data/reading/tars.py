"""Samples of WebDataset tars: of a whole one, of a piece, and where each begins."""

import io
import pathlib
import tarfile
from collections.abc import Callable, Iterator

from capvl import storage

Count = Callable[[str, str], None]
MAX_BYTES = 64_000_000
"""Of one member of a sample."""
CUT = "tar cut short"
TOO_LARGE = "member too large"


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """WebDataset's rule: the key is the path up to the first dot of its last part, the suffix what comes behind.

    Args:
      name: of a member; "./" in front of it says nothing.

    Returns:
      None for hidden files, such as the ._NAME that macOS puts beside every file.
    """
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem:
        return None
    if folder:
        folder = str(pathlib.PurePosixPath(folder))
    return (stem if folder in ("", ".") else f"{folder}/{stem}"), suffix.lower()


class _Member(tarfile.TarInfo):
    """Says so where an archive ends before its end: tarfile takes any header that it can't read for the end, and a
    first end for the last one, though archives may be put one behind the other."""

    @classmethod
    def fromtarfile(cls, archive):
        """The next member."""
        ended, archive.ended = getattr(archive, "ended", False), False
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            archive.ended = True
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as e:
            if ended:  # Whatever fills up the file.
                raise tarfile.EmptyHeaderError(str(e)) from e
            raise tarfile.ReadError(str(e)) from e


def _members(
    archive: tarfile.TarFile, max_bytes: int, count: Count
) -> Iterator[tuple[bool, str, str, tarfile.TarInfo]]:
    """(whether a sample begins with it, key, suffix, member) of what belongs to samples."""
    key, suffixes = None, set()
    for member in archive:
        if not member.isfile():
            continue
        name = member.name
        if not name.isascii():
            # Bytes that are not UTF-8 are half characters here, which nothing can write.
            name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if name.startswith("/") or ".." in name.split("/"):
            count("path climbs out", name)
            continue
        found = key_and_suffix(name)
        if found is None:
            continue
        begins = found[0] != key or found[1] in suffixes
        if begins:
            key, suffixes = found[0], set()
        if member.size <= max_bytes:
            suffixes.add(found[1])
        yield begins, *found, member


def samples(file, path: str, max_bytes: int, count: Count) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Unsafe paths and oversized members are left out before they are read."""
    key, members, bad = None, {}, ""
    try:
        with tarfile.open(fileobj=file, mode="r|*", **_OPTIONS) as archive:
            for begins, stem, suffix, member in _members(archive, max_bytes, count):
                if begins:
                    if bad:
                        count(bad, key)
                    elif members:
                        yield key, members
                    key, members, bad = stem, {}, ""
                if member.size > max_bytes:
                    bad = TOO_LARGE
                    continue
                members[suffix] = archive.extractfile(member).read()
    except Exception as e:  # Each compression has exceptions of its own.
        if storage.passes(e):
            raise
        count(CUT, path)
        members = {}  # The rest of this sample may be behind the cut.
    if bad:
        count(bad, key)
    elif members:
        yield key, members


_OPTIONS = {"ignore_zeros": True, "tarinfo": _Member}
BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * BLOCK)


def sample(data: bytes, count: Count) -> tuple[str, dict[str, bytes]] | None:
    """(key, suffix -> bytes) of the sample that is in a piece of a tar; None where it is left out.

    Args:
      data: from where its first member begins to where that of the next sample does.
      count: told (reason, name) of what is left out.
    """
    return _plain_sample(data) or next(samples(io.BytesIO(data + _END), "", MAX_BYTES, count), None)


def _plain_sample(data: bytes) -> tuple[str, dict[str, bytes]] | None:
    """`sample` where all heads are plain, in a tenth of the time; None where there is anything else."""
    at, key, members = 0, None, {}
    while at + BLOCK <= len(data):
        head = _plain_head(data[at : at + BLOCK])
        found = key_and_suffix(head[0]) if head else None
        if found is None or found[1] in members or key not in (None, found[0]) or head[1] > MAX_BYTES:
            return None
        key, at = found[0], at + BLOCK
        members[found[1]] = data[at : at + head[1]]
        at += -(-head[1] // BLOCK) * BLOCK
        if not any(data[at : at + BLOCK]):
            break  # Of zeros is the end of an archive, and of what is behind it `samples` knows.
    return (key, members) if members and at == len(data) else None


def _plain_head(head: bytes) -> tuple[str, int] | None:
    """(name, bytes) of a plain file in a member's head; None where it is anything else."""
    try:
        size, said = (int(head[b:e].strip(b" \0") or b"0", 8) for b, e in ((124, 136), (148, 156)))
        name = head[:100].partition(b"\0")[0].decode("ascii")
        folder = head[345:500].partition(b"\0")[0].decode("ascii") if head[257:263] == b"ustar\0" else ""
    except ValueError:
        return None
    name = f"{folder}/{name}" if folder else name
    plain = head[156:157] in (b"0", b"\0") and not name.endswith("/")
    whole = sum(head) - sum(head[148:156]) + 8 * ord(" ") == said
    return (name, size) if plain and whole and not name.startswith("/") and ".." not in name else None


def offsets(file, compressed: bool) -> tuple[list[int], str]:
    """Where each sample of an open tar begins, and the last one ends; and why nothing behind it can be read ("": it is
    whole).

    Args:
      file: open for reading; only its members' heads are read where it is not compressed.
      compressed: offsets are then those of what is compressed, and of no use.
    """
    offsets: list[int] = []
    try:
        with tarfile.open(fileobj=file, mode="r|*" if compressed else "r:", **_OPTIONS) as archive:
            for begins, _, _, member in _members(archive, MAX_BYTES, lambda reason, name: None):
                if begins:
                    offsets.append(member.offset)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            return [*offsets, end] if offsets else [0], ""
    except Exception as e:  # Each compression has exceptions of its own.
        if storage.passes(e):
            raise
        return offsets or [0], CUT  # The last sample may be cut, too.
