"""TensorBoard and wandb, each in a thread of its own: what they raise, or hang on, never stops a run."""

import contextlib
import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator

from etils import epath

from capvl import storage
from capvl.errors import UserError
from capvl.terminal import say

LONGEST_CLOSE = 15.0
LONGEST_QUEUE = 10_000
FLUSH_SECONDS = 30.0

Write = Callable[[int, dict[str, float]], None]


class Tracker:
    """Passes numbers on to a service, later."""

    def __init__(self, name: str, session: Callable[[], contextlib.AbstractContextManager[Write]]):
        """session: opens the service, in the tracker's thread, and gives the function that writes there."""
        self._name, self._session = name, session
        self._queue: queue.Queue = queue.Queue(LONGEST_QUEUE)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._session() as write:
                while (item := self._queue.get()) is not None:
                    write(*item)
        except BaseException as e:  # Also SystemExit, which wandb is known to raise.
            say(f"{self._name} is left out from here on ({type(e).__name__}: {storage.reason(e)}); the run goes on.")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Returns at once; numbers that a service can't take in time are dropped."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait((step, values))

    def close(self) -> None:
        """Waits for the service, but not for ever."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=LONGEST_CLOSE)
            self._thread.join(LONGEST_CLOSE)
            if self._thread.is_alive():
                say(f"{self._name} did not end within {LONGEST_CLOSE:.0f} s; its last numbers may be missing there.")


@contextlib.contextmanager
def _tensorboard(workdir: epath.Path, first_step: int) -> Iterator[Write]:
    """tensorboardX's file of events, without its `SummaryWriter`: the queue of that holds a process at its exit for
    ever where a disk is full."""
    # Slow to import.
    from tensorboardX import record_writer, summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder = str(workdir / "tensorboard")
    record_writer.directory_check(folder)
    events = EventsWriter(f"{folder}/events", f".{os.getpid()}")
    # What a killed run wrote of later steps is not shown.
    first = first_step + 1
    events.write_event(Event(step=first, file_version="brain.Event:2"))
    events.write_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
    flushed = 0.0

    def write(step, values):
        nonlocal flushed
        now = time.time()
        for name, value in values.items():
            events.write_event(Event(wall_time=now, step=step, summary=summary.scalar(name, value)))
        if now - flushed > FLUSH_SECONDS:
            events.flush()
            flushed = now

    yield write
    events.close()


@contextlib.contextmanager
def _wandb(workdir: epath.Path, project: str, recipe: dict) -> Iterator[Write]:
    # Optional.
    import wandb

    file = workdir / "wandb_id"
    if not file.exists():
        storage.replace_text(file, wandb.util.generate_id())
    run = wandb.init(
        project=project, name=workdir.name, id=storage.read_text(file), resume="allow", dir=str(workdir), config=recipe
    )

    def write(step, values):
        run.log(values, step=step)

    try:
        yield write
    finally:
        run.finish()


def start(workdir: epath.Path, first_step: int, project: str, recipe: dict) -> list[Tracker]:
    """TensorBoard, and wandb where it has a project.

    Args:
      workdir: of the run.
      first_step: numbers of later steps, left by a killed run, are dropped.
      project: wandb's; "" for none.
      recipe: shown there.
    """
    trackers = [Tracker("TensorBoard", lambda: _tensorboard(workdir, first_step))]
    if project:
        trackers.append(Tracker("wandb", lambda: _wandb(workdir, project, recipe)))
    return trackers


def check(project: str) -> None:
    """Raises UserError where wandb is wanted and not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"wandb={project!r} needs the package wandb: pip install wandb.")
