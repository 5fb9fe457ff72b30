"""One self-contained HTML page of one or several runs: curves, results, written captions."""

import base64
import io
import json
import time

import jax
import numpy as np
from etils import epath
from PIL import Image

from capvl import goodput, metrics, storage, terminal
from capvl.errors import UserError
from capvl.evals import SHOWN, Confusion, Curves, Pictures

CURVES = ("loss", "nll_cap", "nll_pa", "grad_norm", "lr", "images_per_second")
COLORS = ("#2a6fdb", "#e0683b", "#2f9e62", "#9750c9", "#c2a100", "#d0447d")


def save_shown(workdir: epath.Path, step: int, shown: dict[str, list[SHOWN]]) -> None:
    """Writes what evaluators have to show, by their names, to workdir/samples/STEP.json, on the first host; nothing
    where they have nothing to show."""
    if not shown or jax.process_index():
        return
    values = {name: [_plain(value) for value in rows] for name, rows in shown.items()}
    folder = workdir / "samples"
    storage.make_folder(folder)
    storage.replace_text(folder / f"{step}.json", json.dumps(values))


def _plain(value: SHOWN) -> dict:
    if isinstance(value, Confusion):
        told = {"title": value.title, "names": value.names, "columns": value.columns}
        return told | {"counts": value.counts.tolist()}
    if isinstance(value, Curves):
        lines = {name: [np.asarray(axis, float).tolist() for axis in line] for name, line in value.lines.items()}
        return {"title": value.title, "x": value.x, "y": value.y, "lines": lines}
    if isinstance(value, Pictures):
        rows = zip(value.images, value.captions, strict=True)
        return {"title": value.title, "pictures": [{"image": _png(i), "caption": c} for i, c in rows]}
    rows = zip(value.images, value.written, value.references, strict=True)
    return {"samples": [{"image": _png(i), "written": w, "reference": r} for i, w, r in rows]}


def _png(image: np.ndarray) -> str:
    """An image (H, W, 3 or 4), or the frames of a clip (F, H, W, 3) side by side."""
    if image.ndim == 4:
        image = np.concatenate(list(image), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write(workdirs: list[epath.Path], out: epath.Path) -> epath.Path:
    """Writes the page of some runs.

    Raises:
      UserError: a workdir has no metrics, or the page can't be written.
    """
    # Slow to import.
    import jinja2

    runs = [_read_run(epath.Path(w)) for w in workdirs]
    environment = jinja2.Environment(loader=jinja2.PackageLoader("capvl", "."), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        runs=runs,
        curves=[svg for name in _curve_names(runs) if (svg := draw_curve(name, runs))],
        results=_results(runs),
        times=_times(workdirs),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    try:
        epath.Path(out).write_bytes(page.encode())
    except OSError as e:
        raise UserError(f"Report {str(out)!r} can't be written: {e.strerror or e}.") from e
    return epath.Path(out)


def _read_run(workdir: epath.Path) -> dict:
    lines = metrics.read(workdir)
    config = workdir / "config.json"
    recipe = storage.read_json(config) if config.exists() else {}
    files = sorted((workdir / "samples").glob("*.json"), key=lambda f: int(f.stem))
    shown = storage.read_json(files[-1]) if files else {}
    return {
        "name": workdir.name or str(workdir.resolve().name),
        "lines": lines,
        "evaluated": [_evaluated(line) for line in metrics.read_evaluations(workdir)],
        "recipe": recipe,
        "shown": [
            (n, v | {"svg": draw_confusion(v) if "counts" in v else draw_lines(v) if "lines" in v else ""})
            for n, row in shown.items()
            for v in row
        ],
        "shown_step": int(files[-1].stem) if files else None,
        "color": "",
    }


def save_evaluation(workdir: epath.Path, step: int, rows: dict[str, float], shown: dict, **facts) -> None:
    """Prints the numbers of an evaluation after training; they and what it shows are kept for the report.

    Args:
      workdir: of the run.
      step: of the checkpoint.
      rows, shown: of `capvl.evals.run`.
      facts: more to be written beside the numbers into `evaluations.jsonl`; `config` and `overrides` say what is not
        the run's own.
    """
    save_shown(workdir / "evaluate", step, shown)
    terminal.print_results(step, rows, _changes(facts))
    if jax.process_index() == 0:
        lines = storage.Lines(workdir / "evaluations.jsonl")
        lines.append(json.dumps({"step": step} | facts | rows))
        lines.flush()


def _curve_names(runs: list[dict]) -> list[str]:
    seen = {k for run in runs for line in run["lines"] for k in line}
    evaluations = sorted(k for k in seen if "/" in k)
    return [c for c in CURVES if c in seen] + evaluations


def draw_curve(name: str, runs: list[dict]) -> str | None:
    """An SVG of one metric over steps, a line a run; None where no run has two points."""
    # Slow to import.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.6))
    FigureCanvasSVG(figure)
    # Margins by hand: a layout that is worked out draws everything twice.
    axes = figure.add_axes((0.13, 0.1, 0.85, 0.76))
    drawn = False
    for each, color in zip(runs, COLORS * len(runs), strict=False):
        points = [(line["step"], line[name]) for line in each["lines"] if isinstance(line.get(name), int | float)]
        if name in CURVES[:5]:
            points = points[1:] if len(points) > 8 else points
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.4, label=each["name"])
            drawn = True
    if not drawn:
        return None
    axes.set_title(name, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.yaxis.get_offset_text().set_fontsize(7)
    axes.grid(alpha=0.25)
    if len(runs) > 1:
        axes.legend(fontsize=7)
    return _svg(figure)


def draw_lines(value: dict) -> str:
    """An SVG of `capvl.evals.Curves`."""
    # Slow to import.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for (name, line), color in zip(value["lines"].items(), COLORS * len(value["lines"]), strict=False):
        axes.plot(*line, color=color, linewidth=1.4, label=name)
    axes.set_title(value["title"], fontsize=9, loc="left")
    axes.set_xlabel(value["x"], fontsize=7)
    axes.set_ylabel(value["y"], fontsize=7)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    return _svg(figure)


def draw_confusion(value: dict) -> str:
    """An SVG of a confusion (`capvl.evals.Confusion`): shares of each row, what is right from top to bottom."""
    # Slow to import.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names, counts = value["names"], np.array(value["counts"], float)
    side = 1.6 + 0.24 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(counts > 0):
        axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=5.5,
                  color="white" if shares[i, j] > 0.6 else "#1c2530")  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel(value.get("columns", "written"), fontsize=7)
    axes.set_ylabel("right", fontsize=7)
    right = np.trace(counts[:-1, :-1]) / max(counts.sum(), 1)
    axes.set_title(f"{value['title']}: {right:.0%} of {int(counts.sum())}", fontsize=9, loc="left")
    return _svg(figure)


def _svg(figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text.split("?>", 1)[-1].split(">", 1)[-1] if text.startswith("<?xml") else text


def _results(runs: list[dict]) -> list[tuple[str, list[str]]]:
    """(evaluation, last value in each run)."""
    last = [{k: v for line in run["lines"] for k, v in line.items() if "/" in k} for run in runs]
    names = sorted({k for values in last for k in values})
    return [(n, [terminal.result(v[n]) if isinstance(v.get(n), float | int) else "–" for v in last]) for n in names]


def _evaluated(line: dict) -> tuple[str, list[tuple[str, str]]]:
    """(of which step and with which changes, (evaluation, value)) of an evaluation after training."""
    changes = _changes(line)
    what = "untrained" if line.get("untrained") else f"step {line['step']}"
    values = [(k, terminal.result(v)) for k, v in line.items() if "/" in k and isinstance(v, float | int)]
    return f"{what} {changes}".strip(), values


def _changes(facts: dict) -> str:
    """How an evaluation differs from the run's own: another config's data and evaluators, and other keys."""
    config = [f"by {facts['config']}"] if facts.get("config") else []
    return " ".join([*config, *(f"{key}={value}" for key, value in facts.get("overrides", ()))])


def _times(workdirs: list[epath.Path]) -> list[tuple[str, list[str]]]:
    """(bucket, seconds and share of the wall time in each run); [] where no run has a ledger."""
    summaries = [goodput.summary(workdir) for workdir in workdirs]
    names = next((list(s) for s in summaries if s), [])
    return [
        (n.replace("_", " "), [f"{s[n]:,.1f} s, {s[n] / s['wall']:.1%}" if s else "–" for s in summaries])
        for n in names
    ]
