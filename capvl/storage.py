"""Files that survive kills, and storage that fails for a moment: asked again, ever later, then one sentence."""

import errno
import itertools
import os
import pathlib
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from capvl.errors import UserError

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each new attempt, ± a quarter by chance, so that hosts don't all come back at once."""

_ERRNOS = {
    errno.EIO,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.EPIPE,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
}
# What gRPC, HTTP and C++ libraries say where Python would have an errno.
_WORDS = re.compile(
    r"\bUNAVAILABLE\b|\bDEADLINE_EXCEEDED\b|\bABORTED\b|\b(429|500|502|503|504)\b|[Cc]onnection (reset|refused|aborted)"
    r"|[Tt]imed out|[Tt]oo many requests|[Ii]nput/output error|[Ss]tale file handle|temporarily unavailable"
)
_FULL = re.compile(r"No space left|ENOSPC|RESOURCE_EXHAUSTED|[Dd]isk quota exceeded")
T = TypeVar("T")


def passes(error: BaseException | None) -> bool:
    """Whether an error of reading or writing may be gone a moment later."""
    if error is None or isinstance(error, UserError) or _FULL.search(str(error)):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _ERRNOS
    return bool(_WORDS.search(str(error)))


def reason(error: BaseException) -> str:
    """An error of storage in a few words."""
    if _FULL.search(str(error)):
        return "the disk is full"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def wait(pause: float) -> None:
    """Sleeps for a pause of PAUSES."""
    time.sleep(pause * random.uniform(0.75, 1.25))


def retry(call: Callable[..., T], *arguments, what: str) -> T:
    """`call(*arguments)`, again after each of PAUSES where its error may pass.

    Args:
      call, arguments: what to do.
      what: in words, for the sentence.

    Raises:
      UserError: it failed every time.
      Exception: an error that does not pass, as it is.
    """
    for pause in (*PAUSES, None):
        try:
            return call(*arguments)
        except Exception as e:
            if not passes(e):
                raise
            if pause is None:
                raise UserError(f"{what} failed {len(PAUSES) + 1} times; the last time: {reason(e)}.") from e
        wait(pause)
    raise AssertionError("unreachable")


def resume(open_: Callable[[], Iterator[T]], *, what: str) -> Iterator[T]:
    """Items of `open_()`; after an error that may pass, of a new iterator from where the old one failed.

    Raises:
      UserError: it failed every time, or failed for good.
    """
    done, pauses = 0, iter(PAUSES)
    while True:
        try:
            for item in itertools.islice(open_(), done, None):
                yield item
                done, pauses = done + 1, iter(PAUSES)
            return
        except Exception as e:
            if not passes(e.__cause__ if isinstance(e, UserError) else e):
                raise
            pause = next(pauses, None)
            if pause is None:
                raise UserError(f"{what} failed {len(PAUSES) + 1} times; the last time: {reason(e)}.") from e
        wait(pause)


def append_line(path: pathlib.Path, line: str) -> None:
    """Appends a line; a line that a kill tore before it stays alone.

    Raises:
      UserError: the file can't be written.
    """

    def append():
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
            torn = size and file.read(1) != b"\n"
            file.write(b"\n" * bool(torn) + line.encode() + b"\n")

    _write(append, path)


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file that is there whole, old or new, at any time.

    Raises:
      UserError: it can't be written.
    """

    def replace():
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    _write(replace, path)


def _write(call: Callable[[], None], path: pathlib.Path) -> None:
    try:
        retry(call, what=f"Writing {str(path)!r}")
    except OSError as e:
        raise UserError(f"{str(path)!r} can't be written: {reason(e)}.") from e
