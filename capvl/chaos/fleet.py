"""The processes of a training run: started, watched through what they write, ended."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from capvl.errors import UserError
from capvl.lines import split

LONGEST = 600.0
"""Seconds in which anything that is waited for must happen."""


class Fleet:
    """A run of one or several processes in one workdir.

    Attributes:
      workdir: of the run.
      size: how many processes.
    """

    def __init__(self, arguments: list[str], workdir: pathlib.Path, processes: int, logs: pathlib.Path):
        """Starts nothing yet.

        Args:
          arguments: of capvl.main, without the workdir.
          workdir: of the run.
          processes: how many.
          logs: folder for what they print.
        """
        self.workdir, self._logs = workdir, logs
        self._arguments, self.size = [*arguments, f"--workdir={workdir}"], processes
        self._starts = 0
        self._processes: list[subprocess.Popen] = []
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, fault: str = "", seed: int = 0, options: tuple[str, ...] = ()) -> None:
        """Starts all processes, the first of them with a fault of `capvl.chaos.inside`, if any."""
        self._starts += 1
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        self._processes = []
        for i in range(self.size):
            environment = dict(os.environ)
            if self.size > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(self.size),
                    "JAX_PROCESS_ID": str(i),
                }
            module = ["capvl.chaos.inside", fault, str(seed)] if fault and i == 0 else ["capvl.main"]
            command = [sys.executable, "-m", *module, *self._arguments, *options]
            with self._log(i).open("w") as log:
                self._processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))

    def _log(self, process: int) -> pathlib.Path:
        return self._logs / f"{self._starts:04d}-{process}.log"

    def printed(self) -> str:
        """What all processes printed since the last start."""
        return "".join(self._log(i).read_text(errors="replace") for i in range(self.size))

    def begun(self) -> bool:
        """Whether a step is over since the last start."""
        return "compiled in" in self.printed()

    def alive(self) -> bool:
        """Whether any process is."""
        return any(p.poll() is None for p in self._processes)

    def signal(self, number: signal.Signals, process: int) -> None:
        """Sends a signal to one process."""
        self._processes[process].send_signal(number)

    def kill(self) -> None:
        """Ends what is left of the processes."""
        for p in self._processes:
            if p.poll() is None:
                p.kill()
                p.wait()

    def wait(self) -> list[int]:
        """Exit codes of all, once they are over.

        Raises:
          UserError: they aren't within LONGEST seconds.
        """
        self.until(lambda: False)
        return [p.wait() for p in self._processes]

    def until(self, happened: Callable[[], bool]) -> bool:
        """Waits until something happens (True) or all processes are over (False).

        Raises:
          UserError: neither happens within LONGEST seconds; the processes are killed.
        """
        deadline = time.monotonic() + LONGEST
        while not happened():
            if not self.alive():
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise UserError(f"The training hangs: nothing for {LONGEST:.0f} s; see {self._logs}.")
            time.sleep(0.003)
        return True

    def step(self) -> int:
        """The last step that was logged; 0 for none."""
        return max(self.losses(), default=0)

    def losses(self) -> dict[int, float]:
        """Loss of every logged step."""
        path = self.workdir / "metrics.jsonl"
        lines = {}
        for text in split(path.read_text(errors="replace")) if path.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if "loss" in line:
                lines[line["step"]] = line["loss"]
        return lines

    def committed(self) -> list[pathlib.Path]:
        """Checkpoints that are complete, oldest first."""
        return sorted((f for f in self._checkpoints() if f.name.isdigit()), key=lambda f: int(f.name))

    def saving(self) -> bool:
        """Whether a save is under way."""
        return any("tmp" in f.name for f in self._checkpoints())

    def _checkpoints(self) -> list[pathlib.Path]:
        folder = self.workdir / "checkpoints"
        return list(folder.iterdir()) if folder.exists() else []
