"""What a run tells its user on the terminal; only the first host speaks."""

import os
import sys

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table


def say(text: str) -> None:
    """One line of the first host."""
    if jax.process_index() == 0:
        print(text, flush=True)


def console() -> Console:
    """The terminal, or 120 columns where the output goes to a file; silent on other hosts."""
    out = sys.stdout if jax.process_index() == 0 else open(os.devnull, "w")  # noqa: SIM115
    return Console(file=out, width=None if sys.stdout.isatty() else 120, highlight=False)


def print_results(step: int, rows: dict[str, float], changes: str = "") -> None:
    """Evaluation results as a table. `changes`: how the evaluation differs from the run's own."""
    console().print(
        f"after step {step} {changes}".strip(), style="italic", markup=False, highlight=False, soft_wrap=True
    )
    table = Table("evaluation", "value")
    for name, value in rows.items():
        table.add_row(name, result(value))
    console().print(table)


def result(value: float) -> str:
    """A result of an evaluation: four digits behind the point, and none where it is a count."""
    return f"{value:.0f}" if value > 1 and float(value).is_integer() else f"{value:.4f}"


def progress_line(step: int, total: int, values: dict[str, float]) -> str:
    """`step 1000/366500 (0.3%) loss 3.2100 img/s 512 img/s/chip 512 MFU 41.0% data 0.2% ETA 2d3h`."""
    parts = [f"step {step}/{total} ({100 * step / total:.1f}%)", f"loss {values['loss']:.4f}"]
    parts.append(f"img/s {values['images_per_second']:.1f}")
    parts.append(f"img/s/chip {values['images_per_second_per_chip']:.1f}")
    if "mfu" in values:
        parts.append(f"MFU {100 * values['mfu']:.1f}%")
    parts.append(f"data {100 * values['data_wait']:.1f}%")
    for name in ("skipped", "bad_images"):
        if values.get(name):
            parts.append(f"{name} {values[name]:.0f}")
    parts.append(f"ETA {duration((total - step) * values['seconds_per_step'])}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """The two largest units: 2d3h, 5m10s, 12s."""
    seconds = round(seconds)
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    units = [(days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")]
    first = next((i for i, (n, _) in enumerate(units) if n), 3)
    return "".join(f"{n}{u}" for n, u in units[first : first + 2])


def progress(items, total: int, what: str):
    """The items, with a bar on stderr where that is a terminal and this is the first host."""
    if jax.process_index() or not sys.stderr.isatty():
        yield from items
        return
    yield from track(items, what, total, console=Console(stderr=True), transient=True)
