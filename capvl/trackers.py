"""TensorBoard and wandb, each in a thread of its own: what they raise, or hang on, never stops a run."""

import contextlib
import importlib.util
import queue
import threading
from collections.abc import Callable, Iterator

from etils import epath

from capvl import storage
from capvl.errors import UserError
from capvl.terminal import say

LONGEST_CLOSE = 15.0
LONGEST_QUEUE = 10_000

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
    import tensorboardX

    def write(step, values):
        for name, value in values.items():
            board.add_scalar(name, value, step)

    with tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1) as board:
        yield write


@contextlib.contextmanager
def _wandb(workdir: epath.Path, project: str, recipe: dict) -> Iterator[Write]:
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
