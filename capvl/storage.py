"""Files that survive kills, in folders and buckets; storage that fails for a moment is asked again, ever later."""

import atexit
import contextlib
import errno
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from etils import epath

from capvl.errors import UserError
from capvl.lines import split

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each new attempt, ± a quarter by chance, so that hosts don't all come back at once."""

BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}
"""Schemes of buckets, with the package that reads each."""

BUCKET_SECONDS = 30.0

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
    r"\bUNAVAILABLE\b|\bDEADLINE_EXCEEDED\b|\bABORTED\b|[Cc]onnection (reset|refused|aborted)"
    r"|[Tt]imed out|[Tt]oo many requests|[Ii]nput/output error|[Ss]tale file handle|temporarily unavailable"
    # A status of HTTP, and no number of a path, such as a checkpoint's step.
    r"|^(429|500|502|503|504)(?=[,:]| [A-Z])"
    r"|(?i:(, |\b(HTTP(/[\d.]+)?|code|status|error)\W{1,3}))(429|500|502|503|504)(?=$|[\s,:;.)])"
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


def folder(text: str) -> epath.Path:
    """A workdir as a path: a local folder, ~/… too (shells leave it in --workdir=~/…), or gs://BUCKET/…

    Raises:
      UserError: a scheme that nothing here can read.
    """
    scheme = re.match(r"(\w+)://", text)
    if scheme and scheme[1] not in BUCKETS:
        raise UserError(f"{text!r} is neither a local folder nor {' nor '.join(f'{b}://…' for b in BUCKETS)}.")
    if scheme and importlib.util.find_spec(BUCKETS[scheme[1]]) is None:
        raise UserError(f"{text!r} needs the package {BUCKETS[scheme[1]]}: pip install {BUCKETS[scheme[1]]}.")
    return epath.Path(os.path.expanduser(text))


def in_bucket(path: os.PathLike) -> bool:
    """Whether a path is an object of a bucket: written as a whole, never appended to."""
    return "://" in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
    """The same place, whatever the current folder becomes."""
    return path if in_bucket(path) else path.resolve()


def make_folder(path: os.PathLike) -> None:
    """Makes a folder where it isn't there, with those above it.

    Raises:
      UserError: it can't be made.
    """
    try:
        epath.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"Folder {os.fspath(path)!r} can't be made: {reason(e)}.") from e


class Lines:
    """A file that grows by lines.

    In a bucket, where an object can only be written anew, lines are gathered for BUCKET_SECONDS
    or until `flush`.
    """

    def __init__(self, path: epath.Path, keep: Callable[[str], bool] | None = None):
        """Opens it.

        Args:
          path: of the file, which need not exist.
          keep: says which of its lines stay; None for all, also those that are torn.

        Raises:
          UserError: it can't be read or written.
        """
        self._path, self._text, self._waiting, self._written = path, "", False, time.monotonic()
        if keep or in_bucket(path):
            try:
                lines = split(read_text(path)) if path.exists() else []
            except OSError as e:
                raise UserError(f"{str(path)!r} can't be read: {reason(e)}.") from e
            self._text = "".join(line + "\n" for line in lines if keep is None or keep(line))
            replace_text(path, self._text)

    def append(self, line: str) -> None:
        """Appends a line; a line that a kill tore before it stays alone.

        Raises:
          UserError: the file can't be written.
        """
        if not in_bucket(self._path):
            _write(lambda: _append(str(self._path), line), self._path)
            return
        self._text += line + "\n"
        self._waiting = True
        if time.monotonic() - self._written > BUCKET_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is gathered.

        Raises:
          UserError: the file can't be written.
        """
        if self._waiting:
            replace_text(self._path, self._text)
            self._waiting, self._written = False, time.monotonic()


def _append(path: str, line: str) -> None:
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        torn = size and file.read(1) != b"\n"
        file.write(b"\n" * bool(torn) + line.encode() + b"\n")


@contextlib.contextmanager
def new_file(path: epath.Path) -> Iterator[str]:
    """A local file to be written, which becomes `path` when the block is over without an error, and is gone else."""
    if in_bucket(path):
        local = os.path.join(tempfile.gettempdir(), f"{uuid.uuid4().hex}-{path.name}")
    else:
        local = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        yield local
        if in_bucket(path):
            epath.Path(local).copy(path, overwrite=True)
        else:
            os.replace(local, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(local)


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[str]:
    """A file as a local one, for libraries that read no buckets."""
    if not in_bucket(path):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, path.name)
        path.copy(local)
        yield local


def local(path: epath.Path) -> str:
    """The path of a file as a local one until this process ends."""
    if not in_bucket(path):
        return str(path)
    folder = tempfile.mkdtemp(prefix="capvl-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path.copy(os.path.join(folder, path.name))
    return os.path.join(folder, path.name)


def place(source: epath.Path, target: os.PathLike) -> None:
    """Gives a finished file a second name (local), or moves it (in a bucket)."""
    if in_bucket(source):
        source.rename(target)
    else:
        os.link(source, target)


def size(path: str) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return retry(lambda: epath.Path(path).stat().length, what=f"Reading {path!r}")
    except FileNotFoundError:
        return None


def read_text(path: epath.Path) -> str:
    """A file as UTF-8, whatever the locale's encoding is; bytes that a kill tore are replaced."""
    return path.read_bytes().decode("utf-8", "replace")


def read_json(path: epath.Path) -> Any:
    """The value of a JSON file, which is UTF-8.

    Raises:
      UserError: it isn't there, can't be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"{str(path)!r} can't be read: {reason(e)}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{str(path)!r} is not JSON.") from e


def replace_text(path: epath.Path, text: str) -> None:
    """Writes a file that is there whole, old or new, at any time.

    Raises:
      UserError: it can't be written.
    """

    replace_bytes(path, text.encode())


def replace_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file that is there whole, old or new, at any time.

    Raises:
      UserError: it can't be written.
    """

    def replace():
        if in_bucket(path):
            path.write_bytes(data)
            return
        with new_file(path) as local, open(local, "wb") as file:
            file.write(data)

    _write(replace, path)


def copy_up(local: str, path: epath.Path) -> None:
    """Copies a local folder's files into another one, such as one in a bucket."""
    for root, _, files in os.walk(local):
        for name in files:
            target = path / os.path.relpath(root, local) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(root, name).copy(target, overwrite=True)


def _write(call: Callable[[], None], path: epath.Path) -> None:
    try:
        retry(call, what=f"Writing {str(path)!r}")
    except UserError:
        raise
    except Exception as e:  # A bucket's client has exceptions of its own.
        if isinstance(e, OSError) or in_bucket(path):
            raise UserError(f"{str(path)!r} can't be written: {reason(e)}.") from e
        raise
