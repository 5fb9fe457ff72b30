"""Recipes that need less memory, or are faster, found by trying them."""

import dataclasses
from collections.abc import Callable, Iterator

from jax.sharding import AbstractMesh

from capvl.errors import UserError
from capvl.parallel.rules import MESH_AXES, dividing_fsdp
from capvl.planning.ahead import DoesNotFitError
from capvl.planning.estimate import Plan
from capvl.planning.topology import Topology

LADDER = ("none", "dots", "named", "offload", "full")
Planner = Callable[[object, Topology], Plan]


def changed(recipe, *, remat: str = "", fsdp: int = 0, micro_batches: int = 0, batch: int = 0):
    """The recipe with another remat policy, number of weight shards, of micro-batches, or batch."""
    if remat:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, remat=remat))
    if fsdp:
        mesh = dataclasses.replace(recipe.mesh, replica=-1, fsdp=fsdp, tensor=1)
        recipe = dataclasses.replace(recipe, mesh=mesh)
    if micro_batches:
        recipe = dataclasses.replace(recipe, micro_batches=micro_batches)
    if batch:
        recipe = dataclasses.replace(recipe, batch_size=batch)
    return recipe


def smaller(recipe, topology: Topology) -> Iterator[tuple[str, object]]:
    """Ever cheaper recipes in memory, the least costly change in time first, each with the flags that make it."""
    most = _most_fsdp(recipe, topology)
    sharded = recipe.mesh.shape(topology.size, topology.slices)[1] == most
    steps = [] if sharded else [{"fsdp": most}]
    rungs = LADDER[LADDER.index(recipe.model.remat) + 1 :]
    steps += [{"fsdp": 0 if sharded else most, "remat": rung} for rung in rungs if rung in ("named", "full")]
    last = rungs[-1] if rungs else recipe.model.remat
    each = recipe.batch_size // topology.size
    parts = [n for n in (2, 4, 8, 16, 32) if n > recipe.micro_batches and not each % n]
    steps += [{"fsdp": 0 if sharded else most, "remat": last, "micro_batches": n} for n in parts]
    for step in steps:
        yield _flags(step), changed(recipe, **step)


def _most_fsdp(recipe, topology: Topology) -> int:
    """The most shards of the weights, within a slice, over which all of them divide."""
    blueprint = recipe.train_step().blueprint
    mesh = AbstractMesh((topology.slices, topology.size // topology.slices, 1), MESH_AXES)
    return dividing_fsdp(blueprint.axes, blueprint.shapes, mesh)


def _flags(step: dict) -> str:
    flags = []
    if step.get("fsdp"):
        flags.append(f"--config.mesh.replica=-1 --config.mesh.fsdp={step['fsdp']}")
    if step.get("remat"):
        flags.append(f"--config.model.remat={step['remat']}")
    if step.get("micro_batches"):
        flags.append(f"--config.micro_batches={step['micro_batches']}")
    return " ".join(flags)


def make_fit(recipe, topology: Topology, planner: Planner, say=print) -> tuple[str, Plan] | None:
    """The first change of `smaller` that fits, as (flags, plan); None where none does."""
    for flags, candidate in smaller(recipe, topology):
        try:
            plan = planner(candidate, topology)
        except DoesNotFitError as e:
            say(f"  tried {flags}: needs {e.needed / 2**30:.2f} GiB")
            continue
        except UserError as e:
            say(f"  tried {flags}: {e}")
            continue
        say(f"  tried {flags}: needs {plan.total / 2**30:.2f} GiB")
        if plan.fits:
            return flags, plan
    return None


def search(recipe, topology: Topology, planner: Planner, batches, remats, say=print) -> list[Plan]:
    """Plans of every policy and per-chip batch that fits, the fastest per image first."""
    found = []
    for batch in batches:
        for remat in remats:
            candidate = changed(recipe, remat=remat, batch=batch * topology.size)
            label = f"  {batch} images a chip, remat={remat}"
            try:
                plan = planner(candidate, topology)
            except DoesNotFitError as e:
                say(f"{label}: does not fit, needs {e.needed / 2**30:.2f} GiB")
                continue
            if not plan.fits:
                say(f"{label}: does not fit, needs {plan.total / 2**30:.2f} GiB")
                continue
            low, high = plan.images_per_second
            say(f"{label}: {plan.total / 2**30:.2f} GiB, {low:,.0f} to {high:,.0f} images/s")
            found.append(plan)
    return sorted(found, key=lambda plan: -sum(plan.images_per_second))
