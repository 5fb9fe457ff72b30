"""One self-contained HTML page of one or several runs: curves, results, written captions.

python -m capvl.report runs/a runs/b --out=report.html
"""

import argparse
import base64
import io
import json
import time

import numpy as np
from etils import epath

from capvl import goodput, metrics, storage
from capvl.errors import UserError
from capvl.evals import Samples

CURVES = ("loss", "nll_cap", "nll_pa", "grad_norm", "lr", "images_per_second")
COLORS = ("#2a6fdb", "#e0683b", "#2f9e62", "#9750c9", "#c2a100", "#d0447d")


def save_samples(workdir: epath.Path, step: int, samples: Samples) -> None:
    """Writes images (PNG, base64) and captions to workdir/samples/STEP.json, on the first host."""
    import jax

    if jax.process_index():
        return
    rows = [
        {"image": _png(i), "written": w, "reference": r}
        for i, w, r in zip(samples.images, samples.written, samples.references, strict=True)
    ]
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    storage.replace_text(folder / f"{step}.json", json.dumps(rows))


def _png(image: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write(workdirs: list[epath.Path], out: epath.Path) -> epath.Path:
    """Writes the page of some runs.

    Raises:
      UserError: a workdir has no metrics, or the page can't be written.
    """
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
        epath.Path(out).write_text(page)
    except OSError as e:
        raise UserError(f"Report {str(out)!r} can't be written: {e.strerror or e}.") from e
    return epath.Path(out)


def _read_run(workdir: epath.Path) -> dict:
    lines = metrics.read(workdir)
    config = workdir / "config.json"
    recipe = json.loads(config.read_text()) if config.exists() else {}
    files = sorted((workdir / "samples").glob("*.json"), key=lambda f: int(f.stem))
    samples = json.loads(files[-1].read_text()) if files else []
    return {
        "name": workdir.name or str(workdir.resolve().name),
        "lines": lines,
        "recipe": recipe,
        "samples": samples,
        "samples_step": int(files[-1].stem) if files else None,
        "color": "",
    }


def _curve_names(runs: list[dict]) -> list[str]:
    seen = {k for run in runs for line in run["lines"] for k in line}
    evaluations = sorted(k for k in seen if "/" in k)
    return [c for c in CURVES if c in seen] + evaluations


def draw_curve(name: str, runs: list[dict]) -> str | None:
    """An SVG of one metric over steps, a line a run; None where no run has two points."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    drawn = False
    for run, color in zip(runs, COLORS * len(runs), strict=False):
        points = [(line["step"], line[name]) for line in run["lines"] if isinstance(line.get(name), int | float)]
        if name in CURVES[:5]:
            points = points[1:] if len(points) > 8 else points
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.4, label=run["name"])
            drawn = True
    if not drawn:
        return None
    axes.set_title(name, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    if len(runs) > 1:
        axes.legend(fontsize=7)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return (
        buffer.getvalue().split("?>", 1)[-1].split(">", 1)[-1]
        if buffer.getvalue().startswith("<?xml")
        else buffer.getvalue()
    )


def _results(runs: list[dict]) -> list[tuple[str, list[str]]]:
    """(evaluation, last value in each run)."""
    last = [{k: v for line in run["lines"] for k, v in line.items() if "/" in k} for run in runs]
    names = sorted({k for values in last for k in values})
    return [(n, [f"{v[n]:.4f}" if isinstance(v.get(n), float | int) else "–" for v in last]) for n in names]


def _times(workdirs: list[epath.Path]) -> list[tuple[str, list[str]]]:
    """(bucket, seconds and share of the wall time in each run); [] where no run has a ledger."""
    summaries = [goodput.summary(workdir) for workdir in workdirs]
    names = next((list(s) for s in summaries if s), [])
    return [
        (n.replace("_", " "), [f"{s[n]:,.1f} s, {s[n] / s['wall']:.1%}" if s else "–" for s in summaries])
        for n in names
    ]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Draw one or several runs into one HTML page.", allow_abbrev=False)
    parser.add_argument("workdirs", nargs="+", type=storage.folder)
    parser.add_argument("--out", type=epath.Path, default="report.html")
    args = parser.parse_args(argv)
    print(f"Report: {write(args.workdirs, args.out)}")


if __name__ == "__main__":
    from capvl.main import run

    run(main)
