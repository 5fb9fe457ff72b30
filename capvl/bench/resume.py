"""Time to the first batch of a stream that is resumed, and images/s from there on; see `capvl.bench.data`."""

import pathlib
import re
import tempfile
import time
from typing import Any

from capvl.data.examples.image_text import ImageText
from capvl.data.options import DataOptions
from capvl.data.reading.loader import TrainLoader
from capvl.data.scenes import making

FEATURES = ("image", "text")


def measure(pattern: str, positions: list[int], args) -> list[dict[str, Any]]:
    """Seconds to the first batch of a stream, with opening it, and of an image after that, at each position.

    Args:
      pattern: of the files.
      positions: examples over all epochs.
      args: the command's: `res`, `batch`, `batches`, `rounds` (the best of so many) and `index`.
    """
    with tempfile.TemporaryDirectory() as folder:
        index = args.index or f"{folder}/index"
        options = DataOptions(name=f"stream:{pattern}", tokenizer=making.scenes_tokenizer(folder), index=index)
        transform = ImageText.from_options(options, res=args.res, length=64, train=True)
        begin = time.perf_counter()
        TrainLoader(options, transform, FEATURES, batch=args.batch, seed=0)
        made = time.perf_counter() - begin
        found = []
        for position in positions:
            rounds = [_once(options, transform, position, args) for _ in range(args.rounds)]
            best = {key: min(round[key] for round in rounds) for key in rounds[0]}
            found.append({"position": position, "index": made} | best)
    return found


def _once(options: DataOptions, transform, position: int, args) -> dict[str, float]:
    begin, read, cpu = time.perf_counter(), _read(), time.process_time()
    loader = TrainLoader(options, transform, FEATURES, batch=args.batch, seed=0, position=position)
    next(loader)
    first = time.perf_counter()
    times = {"first": first - begin, "cpu": time.process_time() - cpu, "bytes": _read() - read}
    cpu = time.process_time()
    for _ in range(args.batches):
        next(loader)
    count = args.batches * args.batch
    return times | {"image": (time.perf_counter() - first) / count, "image_cpu": (time.process_time() - cpu) / count}


def _read() -> int:
    """Bytes that this process has read from files so far; 0 where the system doesn't say."""
    file = pathlib.Path("/proc/self/io")
    return int(re.search(r"rchar: (\d+)", file.read_text())[1]) if file.exists() else 0


def print_numbers(found: list[dict[str, Any]]) -> None:
    """A line for each position."""
    print(f"index made in {found[0]['index']:.1f} s, or compared with the files")
    for row in found:
        print(
            f"position {row['position']:>12,}   first batch after {row['first']:7.2f} s "
            f"({row['cpu']:.2f} s CPU, {row['bytes'] / 1e6:.1f} MB read)   then {1 / row['image']:.0f} images/s, "
            f"{1e3 * row['image_cpu']:.3f} ms CPU an image"
        )
