"""Plans as tables on the terminal, and as plain values."""

import argparse
import json

from rich.table import Table

from capvl import recipes
from capvl.errors import UserError, nearest
from capvl.planning import ahead, libtpu, search
from capvl.planning import topology as topologies
from capvl.planning.ahead import DoesNotFitError
from capvl.planning.estimate import compiled_plan, paper_plan
from capvl.planning.search import LADDER
from capvl.terminal import console

GIB = 2**30


def plan_all(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """What `capvl.plan` does once JAX's environment is prepared.

    Args:
      args: of the command.
      overrides: config keys to change.

    Raises:
      UserError: the recipe doesn't fit one of the topologies.
    """
    recipe = recipes.load(args.config, overrides)
    places = [topologies.parse(text, args.slices) for text in args.topology]
    if not args.analytic:
        libtpu.wait_for_lock(args.wait)
        ahead.devices(places[0])
    results = [_plan(recipe, place, args) for place in places]
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    if not all(result["hbm"]["fits"] for result in results if not args.search):
        raise UserError(f"{args.config} doesn't fit {', '.join(args.topology)}; see above.")


def _plan(recipe, place, args) -> dict:
    """Plans one topology, prints it, and returns it as plain values."""
    planner = paper_plan if args.analytic else compiled_plan
    if args.search:
        batches, remats = _numbers(args.batches), _policies(args.remats)
        print(f"{args.config} on {place.name}: trying {len(batches) * len(remats)} recipes")
        found = search.search(recipe, place, planner, batches, remats)
        if not found:
            raise UserError(f"No per-chip batch of {args.batches} with remat {args.remats} fits {place.name}.")
        show(found[0], args.config)
        return found[0].values() | {"candidates": [plan.values() for plan in found]}
    try:
        plan = planner(recipe, place)
        needed, values = plan.total, plan.values()
    except DoesNotFitError as e:
        plan, needed = None, e.needed
        hbm = {"total": e.needed, "capacity": e.available, "fits": False}
        values = {"topology": place.name, "source": "compiled", "hbm": hbm}
    if plan:
        show(plan, args.config)
    if not plan or not plan.fits:
        over = (needed - place.chip.hbm_bytes) / GIB
        print(f"{args.config} needs {needed / GIB:.2f} GiB a chip on {place.name}, {over:.2f} GiB more than it has.")
        values["fix"] = _fix(recipe, place, planner)
    return values


def _fix(recipe, place, planner) -> dict | None:
    fixed = search.make_fit(recipe, place, planner)
    if not fixed:
        print("No remat policy, sharding or number of micro-batches makes it fit; take more chips or a smaller batch.")
        return None
    flags, plan = fixed
    print(f"The cheapest change that makes it fit: {flags}")
    show(plan, flags)
    return {"flags": flags} | plan.values()


def _numbers(text: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",")]
    except ValueError as e:
        raise UserError(f"--batches={text} should be whole numbers with commas between them.") from e


def _policies(text: str) -> list[str]:
    for policy in text.split(","):
        if policy not in LADDER:
            raise UserError(f"--remats={text}: unknown policy {policy!r}." + nearest(policy, LADDER))
    return text.split(",")


def show(plan, title: str) -> None:
    """Prints a plan as a table."""
    chip, times, (least, most) = plan.topology.chip, plan.times, plan.step_seconds
    how = "compiled ahead of time" if plan.source == "compiled" else "on paper: memory and bytes are lower bounds"
    table = Table(title=f"{title} on {plan.topology.name} ({how})", title_justify="left", show_header=False)
    each = plan.batch / plan.topology.size
    low, high = plan.images_per_second
    rows = {
        "chips, hosts": f"{plan.topology.size}, {plan.topology.hosts}",
        "mesh replica x fsdp x tensor": " x ".join(map(str, plan.mesh)),
        "batch, a chip": f"{plan.batch:,}, {each:g} in {plan.micro_batches} parts, remat={plan.remat}",
        "HBM arguments": f"{plan.arguments / GIB:.2f} GiB",
        "HBM temporaries": f"{plan.temporaries / GIB:.2f} GiB",
        "HBM total": f"{plan.total / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB: "
        + ("fits" if plan.fits else "DOES NOT FIT"),
        "matmul FLOPs": f"{plan.cost.flops / 1e12:.3f} T ({plan.cost.flops / plan.analytic_flops:.3f} of the analytic "
        f"{plan.analytic_flops / 1e12:.3f} T)",
        "bytes, of HBM": f"{plan.cost.bytes / 1e9:.1f} GB, {plan.cost.hbm_bytes / 1e9:.1f} GB",
        "compute time": f"{times.compute * 1e3:.1f} ms",
        "HBM time": f"{times.hbm * 1e3:.1f} ms",
        "network time": f"{times.ici * 1e3:.1f} ms in a slice, {times.dcn * 1e3:.1f} ms between slices",
        "binds": times.binds,
        "step": f"{least * 1e3:.0f} to {most * 1e3:.0f} ms",
        "images/s": f"{low:,.0f} to {high:,.0f} ({low / plan.topology.size:,.0f} to {high / plan.topology.size:,.0f} a "
        f"chip, {high / plan.topology.hosts:,.0f} a host at most)",
        "MFU": f"{plan.mfu[0]:.0%} to {plan.mfu[1]:.0%}",
    }
    for (kind, moved, group, crosses), count in plan.cost.collectives.most_common():
        if moved * count >= 1e6:
            where = " across slices" if crosses else ""
            rows[f"{kind} over {group}{where}, {moved / 1e6:,.1f} MB"] = f"{count:g} times"
    if len(plan.buckets) > 1:
        rows["compilations"] = f"{len(plan.buckets)}, for images of {', '.join(map(str, plan.buckets))}"
        rows["of these"] = "memory is the largest, work and times are the mean"
    if plan.seconds:
        rows["compiled in"] = f"{plan.seconds:.0f} s"
    for name, value in rows.items():
        table.add_row(name, value)
    console().print(table)
    if plan.advice:
        print(plan.advice)
