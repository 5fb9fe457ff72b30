"""Speed of encoding all images of a split, as evaluators do, beside that of its two halves and of a plain loop.

    python -m capvl.bench features --config=configs/cappa_flickr8k.py --data=flickr8k:val
    python -m capvl.bench features --config=configs/cappa_flickr8k.py --data=flickr8k:val --wait=100

The halves are reading and decoding in so many threads without a model, and the model on batches that are there already.
Nothing that decodes on these cores is faster than the slower of the two; where the model runs on the same cores (no
accelerator), both share them, and 1 / (1 / decode + 1 / model) is the most. With --wait the model is played by a wait
of so many ms a batch, in which the cores are free, as while an accelerator computes. The plain loop makes a batch,
sends it, computes, fetches, and only then makes the next. All take turns, so that what else the machine does hits all.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from capvl import recipes
from capvl.command import config_arguments
from capvl.data.randomness import Uniforms
from capvl.data.reading import evaluating, loader, sources
from capvl.data.reading.batches import stack
from capvl.errors import UserError
from capvl.evals import Context, to_host
from capvl.evals.encode import image_transform, over_batches
from capvl.inference.compiled import compiled
from capvl.inference.matching import features
from capvl.models.abilities import Ability, require
from capvl.parallel.mesh import make_mesh
from capvl.parallel.rules import batch_sharding


def drawn(blueprint) -> dict[str, np.ndarray]:
    """Parameters without a meaning."""
    rng = np.random.default_rng(0)
    return {name: 0.02 * rng.standard_normal(s.shape, np.float32) for name, s in blueprint.shapes.items()}


def waiting(milliseconds: float):
    """A compiled function of (params, images) that takes so long and no core, and gives the images' first values."""

    def wait(x):
        time.sleep(milliseconds / 1e3)
        return x

    def call(params, image):
        first = image[:, 0, 0].astype(jnp.float32)
        return jax.pure_callback(wait, jax.ShapeDtypeStruct(first.shape, first.dtype), first)

    return jax.jit(call)


def calls(context: Context, source, function, params) -> dict:
    """Functions that go over all images once, by name."""
    transform, batch = image_transform(context), context.batch
    sharding, numbers = batch_sharding(context.mesh), range(len(source))

    def decode():
        def some(first: int) -> None:
            for n in numbers[first : first + evaluating.ROWS]:
                transform(source[n], Uniforms(0, n))

        with concurrent.futures.ThreadPoolExecutor(context.data.threads) as pool:
            list(pool.map(some, numbers[:: evaluating.ROWS]))

    ready = [loader.to_device(b, sharding) for b in evaluating.eval_batches(source, transform, batch)]

    def model():
        waits = [function(params, b["image"]) for b in ready]
        return np.concatenate([to_host(found) for found in waits])[: len(source)]

    def plain():
        kept = []
        for first in numbers[::batch]:
            rows = [transform(source[n], Uniforms(0, n)) for n in numbers[first : first + batch]]
            made = stack([*rows, *rows[:1] * (batch - len(rows))])
            kept.append(to_host(function(params, loader.to_device(made, sharding)["image"]))[: len(rows)])
        return np.concatenate(kept)

    def whole():
        def outputs(b):
            return function(params, b["image"]), b["mask"]

        kept = over_batches(context, source, transform, outputs, "images")
        return np.concatenate([found[mask] for found, mask in kept])

    return {"decode": decode, "model": model, "plain": plain, "whole": whole}


def measure(context: Context, source, function, params, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """(images/s of each of `calls` in its fastest round of so many, CPU seconds of this process for an image).

    Raises:
      UserError: an image can't be decoded.
    """
    own, best, cpu = calls(context, source, function, params), {}, {}
    outputs = [own[name]() for name in ("model", "plain", "whole")]  # The first one compiles.
    if not all(np.array_equal(outputs[0], found) for found in outputs[1:]):
        raise UserError("The features of the plain loop are others; that should not be.")
    for _ in range(rounds):
        for name, call in own.items():
            begin, used = time.perf_counter(), time.process_time()
            call()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - begin)
            cpu[name] = min(cpu.get(name, float("inf")), time.process_time() - used)
    rates = {name: len(source) / seconds for name, seconds in best.items()}
    return rates, {name: seconds / len(source) for name, seconds in cpu.items()}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m capvl.bench features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a recipe with an image tower")
    parser.add_argument("--data", default="", help="NAME:SPLIT of a prepared data set; by default the recipe's 'val'")
    parser.add_argument("--limit", type=int, default=0, help="the first so many images")
    parser.add_argument("--wait", type=float, default=0.0, help="ms a batch of a model that is played by a wait")
    parser.add_argument("--rounds", type=int, default=5, help="of each, the fastest of which counts")
    parser.add_argument("--json", default="", help="also write the numbers to this file")
    args, overrides = config_arguments(parser, argv)
    recipe = recipes.load(args.config, overrides)
    require(recipe.model, "capvl.bench features", Ability.IMAGES)
    if args.rounds < 1 or min(args.limit, args.wait) < 0:
        raise UserError("--rounds should be at least 1, --limit and --wait not negative.")
    name, _, split = (args.data or f"{recipe.data.parts()[0][0]}:val").rpartition(":")
    source = sources.open_source(name or split, split if name else "val", recipe.data.directory(), features=("image",))
    if args.limit:
        source = sources.Subset(source, np.arange(min(args.limit, len(source))))
    mesh, blueprint = make_mesh(recipe.mesh), recipe.train_step().blueprint
    with jax.set_mesh(mesh):
        params = jax.device_put(drawn(blueprint), blueprint.shardings(mesh))
        function = waiting(args.wait) if args.wait else compiled(blueprint, features)
        context = recipe.context(mesh, blueprint, None)
        numbers, cpu = measure(context, source, function, params, args.rounds)
    shares = {"slower": min(numbers["decode"], numbers["model"])}
    if not args.wait and jax.default_backend() == "cpu":
        shares["shared"] = 1 / (1 / numbers["decode"] + 1 / numbers["model"])
    print_numbers(numbers, cpu, shares, context)
    if args.json:
        told = numbers | shares | {"cpu_seconds": cpu} | dataclasses.asdict(recipe.data)
        pathlib.Path(args.json).write_text(json.dumps(told, indent=1))


def print_numbers(numbers: dict[str, float], cpu: dict[str, float], shares: dict[str, float], context: Context) -> None:
    """The rates, and both loops' shares of what is possible."""
    data = context.data
    made = f"{data.workers} worker processes" if data.workers else f"{data.threads} threads"
    what = {"decode": f"read and decode, {data.threads} threads", "model": "model, batches there"}
    what |= {"plain": "plain loop", "whole": f"evaluators, {made}"}
    for name, rate in numbers.items():
        print(f"{what[name]:30s} {rate:9.0f} images/s   {1e3 * cpu[name]:7.3f} ms CPU an image")
    said = {"slower": "the slower half", "shared": "halves that share the cores"}
    for name, most in shares.items():
        both = f"plain loop {numbers['plain'] / most:.3f}, evaluators {numbers['whole'] / most:.3f}"
        print(f"share of {said[name]} ({most:.0f}/s): {both}")
    print(f"batch {context.batch}; load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
