"""The table of object detection in the wild: AP over many small data sets, by how many images each was tuned on (ODinW;
GLIP, arXiv 2112.03857, section 4.3)."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

SHOTS = ("0", "1", "3", "5", "10", "all")
"""Images of each class that were tuned on, in the table's order."""

Results = Mapping[str, Mapping[str, Sequence[float]]]
"""shots -> data set -> AP of each run: several seeds, or one."""


def rows(results: Results) -> list[dict[str, Any]]:
    """A row for each number of shots, in the order of SHOTS and then as given: `shots`, `mean` over the data sets,
    `std` of that mean over seeds, and `sets`: data set -> its mean over seeds. A mean is None where a data set that
    other rows have is lacking: it would compare with none of them.

    Raises:
      ValueError: a data set has no number, or of one row they have numbers of different seeds.
    """
    order = sorted(results, key=lambda shots: (SHOTS.index(shots) if shots in SHOTS else len(SHOTS),))
    names = list(dict.fromkeys(name for shots in order for name in results[shots]))
    found = []
    for shots in order:
        own = {name: [float(value) for value in results[shots][name]] for name in names if name in results[shots]}
        counts = {len(values) for values in own.values()}
        if len(counts) > 1 or 0 in counts:
            raise ValueError(f"{shots} shots: the data sets have {sorted(counts)} runs, and should have as many each")
        means = {name: sum(values) / len(values) for name, values in own.items()}
        mean = std = None
        if len(own) == len(names):
            of_seeds = [sum(values) / len(values) for values in zip(*own.values(), strict=True)]
            mean = sum(of_seeds) / len(of_seeds)
            std = math.sqrt(sum((value - mean) ** 2 for value in of_seeds) / len(of_seeds))
        found.append({"shots": shots, "mean": mean, "std": std, "sets": means})
    return found


def table(results: Results) -> str:
    """The rows in Markdown, in percent, one decimal."""
    found = rows(results)
    names = list(dict.fromkeys(name for row in found for name in row["sets"]))
    lines = ["| shots | mean | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for row in found:
        several = row["std"] is not None and len(next(iter(results[row["shots"]].values()))) > 1
        mean = _percent(row["mean"]) + (f" ± {100 * row['std']:.1f}" if several else "")
        lines.append(f"| {row['shots']} | {mean} | " + " | ".join(_percent(row["sets"].get(n)) for n in names) + " |")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def as_json(results: Results) -> str:
    """The rows as JSON."""
    return json.dumps({"rows": rows(results)}, indent=1)
