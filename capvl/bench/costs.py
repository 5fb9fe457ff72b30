"""Where a compiled program's time goes: a profiler's trace, read against the program's own text.

Each operation of the trace is looked up in the program, whose metadata says from which line of the source it came;
fused operations count for the line of their last one.
"""

import glob
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import jax

# What an instruction of these kinds takes is what the instructions inside it take.
_AROUND = ("while", "call", "conditional", "async")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")
_METADATA = re.compile(r'metadata=\{op_name="([^"]*)"[^}]*?(?:stack_frame_id=(\d+))?\}')
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=\d+ line=(\d+)")
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?\}")
_NAME = re.compile(r'^(\d+) "(.*)"$')


class Cost(NamedTuple):
    """What one line of the source costs: seconds of one run, and their share of all seconds on the device."""

    where: str
    seconds: float
    share: float


def measure(run: Callable[[], None], program: str, times: int) -> list[Cost]:
    """Costs by line of the source, the largest first.

    Args:
      run: runs the program once, to the end.
      program: its text (`compiled.as_text()`).
      times: how often it is run under the profiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(times):
                run()
        (file,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        spent = _by_instruction(jax.profiler.ProfileData.from_file(file))
    places, lines = _places(program), defaultdict(float)
    for name, seconds in spent.items():
        lines[places.get(name, name)] += seconds / times
    total = sum(lines.values())
    return [Cost(where, s, s / total) for where, s in sorted(lines.items(), key=lambda row: -row[1])]


def _by_instruction(trace) -> dict[str, float]:
    """Seconds by name of an instruction; of accelerators alone where there are any."""
    planes = list(trace.planes)
    devices = [p for p in planes if p.name.startswith("/device:") and "CUSTOM" not in p.name]
    spent: dict[str, float] = defaultdict(float)
    for plane in devices or planes:
        for line in plane.lines:
            for event in line.events:
                name = next((str(value) for key, value in event.stats if key == "hlo_op"), "")
                if name and not name.startswith(_AROUND):
                    spent[name] += event.duration_ns / 1e9
    return spent


def _places(program: str) -> dict[str, str]:
    """Instruction -> "file:line operation (pass)" from a program's text."""
    section, files, locations, frames, places = "", {}, {}, {}, {}
    for line in program.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            section = line
        elif section == "FileNames" and (m := _NAME.match(line)):
            files[m[1]] = m[2]
        elif section == "FileLocations" and (m := _LOCATION.match(line)):
            locations[m[1]] = f"{_short(files.get(m[2], '?'))}:{m[3]}"
        elif section == "StackFrames" and (m := _FRAME.match(line)):
            frames[m[1]] = (locations.get(m[2], "?"), m[3])
        elif (m := _INSTRUCTION.match(line)) and (said := _METADATA.search(line)):
            backward = ", backward" if "transpose(" in said[1] else ""
            places[m[1]] = f"{_innermost(frames, said[2])} {said[1].rsplit('/', 1)[-1]}{backward}"
    return places


def _short(file: str) -> str:
    """A file's path from this package on; others by their name."""
    parts = file.split("/")
    return "/".join(parts[parts.index("capvl") :]) if "capvl" in parts else parts[-1]


def _innermost(frames: dict[str, tuple[str, str | None]], number: str | None) -> str:
    """The innermost frame of a call that is in this package, or else the innermost of all."""
    first, last = frames.get(number or "", ("?", None))[0], None
    while number in frames and number != last:  # The outermost frame names itself as its parent.
        where, parent = frames[number]
        if where.startswith("capvl/"):
            return where
        number, last = parent, number
    return first
