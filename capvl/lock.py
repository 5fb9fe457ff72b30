"""One run at a time in a workdir: a file that says whose it is, renewed by its holder while that lives.

Clocks of machines are never compared: a holder on this machine is looked up among its processes, and
one elsewhere is alive if the file's counter moves while it is watched.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import platform
import signal
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator

import psutil
from etils import epath

from capvl import storage
from capvl.errors import UserError
from capvl.parallel import distributed
from capvl.terminal import say

NAME = "lock.json"
BEAT_SECONDS = 5.0
# Six missed beats. A holder that comes back after them finds that the workdir is no longer its own.
WATCH_SECONDS = 30.0
# A holder that was asked to stop is still saving; whoever comes meanwhile waits so long for it.
LEAVE_SECONDS = 600.0
# In buckets two may write at once: each looks again after so long whether it was the last.
SETTLE_SECONDS = 2.0
LOOK_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who has a workdir.

    Attributes:
      id: of this hold, random.
      host: the machine's name.
      machine: the boot of the machine and its room of process numbers; "" where these aren't known.
      folder: which folder of that machine is meant, so that a copy of it is told; "" in buckets.
      pid, began: of the process: its number, and when it began (`_began`).
      since: when it took the workdir, in words.
      beat: counts up.
      leaving: whether it was asked to stop and is saving.
    """

    id: str
    host: str
    machine: str
    folder: str
    pid: int
    began: float
    since: str
    beat: int = 0
    leaving: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lock:
    """A workdir that is held: the file is renewed until `release`."""

    def __init__(self, path: epath.Path, mine: Holder, leaving: Callable[[], bool]):
        """See `held`."""
        self._path, self._mine, self._leaving = path, mine, leaving
        self._end = threading.Event()
        self._lost: Holder | None = None
        self._thread = threading.Thread(target=self._renew, name="capvl-lock", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        beaten = time.monotonic()
        # That it is leaving is said soon, as whoever was told to stop it starts the next run at once.
        while not self._end.wait(min(BEAT_SECONDS, LOOK_SECONDS)):
            if time.monotonic() - beaten < BEAT_SECONDS and self._leaving() == self._mine.leaving:
                continue
            beaten = time.monotonic()
            with contextlib.suppress(Exception):  # Storage that fails now may work at the next beat.
                if self._taken():
                    os.kill(os.getpid(), signal.SIGTERM)  # The run stops after its step, and `check` says why.
                    return
                self._mine = dataclasses.replace(self._mine, beat=self._mine.beat + 1, leaving=self._leaving())
                _write(self._path, self._mine)

    def _taken(self) -> bool:
        found = _read(self._path)
        if found is not None and found.id != self._mine.id:
            self._lost = found
        return self._lost is not None

    def check(self) -> None:
        """Raises UserError where another run took the workdir, as this one was silent for too long."""
        with contextlib.suppress(Exception):
            self._taken()
        if self._lost:
            raise UserError(
                f"Workdir {str(self._path.parent)!r} was taken over by {self._lost}, as this run gave no sign of life "
                f"for {WATCH_SECONDS:.0f} s; it ends, and saves nothing more."
            )

    def release(self) -> None:
        """Gives the workdir back."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            if not self._taken():
                self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(workdir: epath.Path, leaving: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """Holds a workdir for the block, for all processes of a run; the first of them does it.

    Args:
      workdir: which is there.
      leaving: whether this run was asked to stop.

    Yields:
      A function that raises UserError, on all processes, where the workdir is no longer this run's.

    Raises:
      UserError: another run that lives has it.
    """
    lock = distributed.first(lambda: Lock(workdir / NAME, _take(workdir / NAME, leaving), leaving))

    def check() -> None:
        distributed.first(lambda: lock.check())  # noqa: PLW0108 - Only the first process has one.

    try:
        yield check
    finally:
        if lock:
            lock.release()


def _take(path: epath.Path, leaving: Callable[[], bool]) -> Holder:
    """Writes one's own file once there is none, or its holder is known to be dead.

    Raises:
      UserError: its holder lives.
      KeyboardInterrupt: this run was asked to stop while it waited.
    """
    watch, begun, told = _Watch(path), time.monotonic(), None
    while True:
        with _alone(path.parent) as alone:
            free = watch.look()
            if free:
                if watch.holder:
                    say(f"The run that had {path.parent} is dead ({watch.holder}); its workdir is taken over.")
                mine = _myself(path.parent)
                _write(path, mine)
                if alone or _settled(path, mine):
                    return mine
                continue
        holder = watch.holder
        if free is False and not (holder.leaving and time.monotonic() - begun < LEAVE_SECONDS):
            raise UserError(
                f"Workdir {str(path.parent)!r} is in use by {holder}; choose another --workdir, or end that run first."
            )
        if told != (holder.id, free):
            told = (holder.id, free)
            what = "which is saving; waiting until it is done" if free is False else "watching whether it lives"
            say(f"{path.parent} is held by {holder}; {what} …")
        if leaving():
            raise KeyboardInterrupt
        time.sleep(LOOK_SECONDS)


class _Watch:
    """What looking at a lock again and again tells of its holder.

    Attributes:
      holder: that was seen last; None for none.
    """

    def __init__(self, path: epath.Path):
        self._path, self._since = path, 0.0
        self.holder: Holder | None = None

    def look(self) -> bool | None:
        """Whether the workdir is free; None where that is not known yet."""
        before, self.holder = self.holder, _read(self._path)
        if self.holder != before:
            self._since = time.monotonic()
        if self.holder is None:
            return True
        here = (_machine(), _number(self._path.parent))
        if self.holder.machine and (self.holder.machine, self.holder.folder) == here:
            return not _runs(self.holder)
        if before and before != self.holder and before.id == self.holder.id:
            return False
        return True if time.monotonic() - self._since > WATCH_SECONDS else None


def _runs(holder: Holder) -> bool:
    """Whether a process of this machine still is the one that wrote the lock, and not another with its number."""
    try:
        process = psutil.Process(holder.pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(_began(holder.pid) - holder.began) < 2
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # It is there, and somebody else's.
        return True


def _began(pid: int) -> float:
    """When a process of this machine began. Linux counts ticks since the boot, which setting a clock does not change.

    Raises:
      psutil.Error: there is none.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return float(file.read().rpartition(b")")[2].split()[19])
    except OSError:
        return psutil.Process(pid).create_time()


def _myself(folder: epath.Path) -> Holder:
    since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    pid = os.getpid()
    return Holder(uuid.uuid4().hex, platform.node(), _machine(), _number(folder), pid, _began(pid), since)


def _number(folder: epath.Path) -> str:
    """A local folder's number on this machine; a copy has another. "" in buckets."""
    if storage.in_bucket(folder):
        return ""
    found = os.stat(folder)
    return f"{found.st_dev} {found.st_ino}"


def _machine() -> str:
    """Which process numbers are meant: of this boot of this machine, within this container."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{platform.node()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {psutil.boot_time() // 60:.0f}"


def _read(path: epath.Path) -> Holder | None:
    """Who has the workdir. A file that can't be understood is a holder's who is not known."""
    try:
        data = storage.retry(path.read_bytes, what=f"Reading {str(path)!r}")
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(
            f"{str(path)!r} can't be read ({storage.reason(e)}), and says whether another run has the workdir; remove "
            f"it if none has."
        ) from e
    try:
        holder = Holder(**json.loads(data))
        right = all(isinstance(getattr(holder, f.name), f.type) for f in dataclasses.fields(holder)) and holder.pid > 0
    except (ValueError, TypeError, RecursionError):
        right = False
    if right:
        return holder
    return Holder("", "an unknown machine", "", "", 0, 0.0, "an unknown time", beat=zlib.crc32(data))


def _write(path: epath.Path, holder: Holder) -> None:
    storage.replace_text(path, json.dumps(dataclasses.asdict(holder)))


def _settled(path: epath.Path, mine: Holder) -> bool:
    """Whether no other run wrote the file at the same time, or a moment later."""
    time.sleep(SETTLE_SECONDS)
    found = _read(path)
    return found is not None and found.id == mine.id


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[bool]:
    """Keeps other starts from looking at the lock within the block; False where that can't be had, as in buckets."""
    if storage.in_bucket(folder):
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _flock(descriptor)
    finally:
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    """Locks an open folder until it is closed. False where it can't: some network file systems have no locks, and a
    start that was suspended may keep one."""
    begun = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - begun > WATCH_SECONDS:
                return False
            time.sleep(0.05)
        except OSError:
            return False
        else:
            return True
