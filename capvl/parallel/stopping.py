"""How a run is stopped: by a signal to any of its processes, or because it hangs."""

import contextlib
import faulthandler
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether SIGTERM or SIGINT asked this process, or any other of the run, to save and leave.

    With several processes JAX's preemption service takes SIGTERM, and all leave after the same step.
    """

    def __init__(self):
        self.asked = False
        self._old = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def now(self, step: int) -> bool:
        """The same answer on all hosts."""
        if jax.process_count() == 1:
            return self.asked
        self.asked = multihost_utils.reached_preemption_sync_point(step)
        return self.asked


class Watchdog:
    """Ends the process, with the stacks of all threads on stderr, when no step begins for so many seconds."""

    def __init__(self, seconds: float):
        """seconds: 0 for never."""
        self._seconds = seconds

    def beat(self) -> None:
        """A step begins. The timer is C code: it also runs where Python hangs in a call."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)

    @contextlib.contextmanager
    def off(self):
        """No step is expected within the block."""
        self.close()
        yield
        self.beat()

    def close(self) -> None:
        """No step is expected any more."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
