"""What is said of a run before it begins: its recipe, its parameters, its mesh."""

import jax
from rich.table import Table

from capvl.models import parameters
from capvl.parallel import rules
from capvl.terminal import console


def print_overview(recipe, step, mesh, workdir) -> None:
    """The resolved recipe in a few lines, and the parameters with their shardings.

    Args:
      recipe: a `capvl.recipes.Recipe`.
      step: its `capvl.step.TrainStep`.
      mesh, workdir: of the run.
    """
    out = console()
    values = {k: v for k, v in recipe.source.items() if k != "evals"}
    for section, value in values.items():
        if isinstance(value, dict):
            out.print(f"[bold]{section}[/]  " + _pairs(value))
    out.print("[bold]run[/]  " + _pairs({k: v for k, v in values.items() if not isinstance(v, dict)}))
    out.print(f"[bold]evals[/]  {'  '.join(recipe.evals) or 'none'}")
    out.print(f"[bold]workdir[/]  {workdir}\n")
    shardings = step.blueprint.shardings(mesh)
    table = Table(box=None, pad_edge=False)
    for heading in ("parameter", "shape", "sharding", ""):
        table.add_column(heading, no_wrap=True)
    for name, leaf in step.blueprint.shapes.items():
        axes = ", ".join("-" if a is None else str(a) for a in shardings[name].spec)
        shape = " x ".join(map(str, leaf.shape))
        table.add_row(name, shape, axes, "" if name in step.trainable else "frozen")
    out.print(table)
    total = parameters.count(step.blueprint.shapes)
    encoder = parameters.count(step.blueprint.shapes, "encoder/.*")
    devices = " x ".join(f"{k}={v}" for k, v in mesh.shape.items())
    advice = rules.fsdp_advice(step.blueprint.axes, step.blueprint.shapes, mesh)
    kind = jax.devices()[0].device_kind
    out.print(f"\n{total / 1e6:.2f} M parameters, {encoder / 1e6:.2f} M of them in the encoder")
    out.print(f"{recipe.objective.flops(recipe.model) / 1e9:.2f} GFLOP an image, {mesh.size} {kind} ({devices})\n")
    if advice:
        out.print(f"{advice}\n")


def _pairs(values: dict) -> str:
    """key=value for what says something: empty values are left out."""
    return "  ".join(f"{k}={v}" for k, v in values.items() if v not in ("", [], None)).replace("[", "\\[")
