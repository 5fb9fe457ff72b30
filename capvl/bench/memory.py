"""Memory over many training steps whose images change their size, once the step is compiled for each of them.

    python -m capvl.bench memory --config=configs/git_demo.py --steps=1000

The recipe's own data, its own step and its own loader; nothing is evaluated or saved.
"""

import argparse
import dataclasses
import json

import jax
import psutil

from capvl import recipes, terminal
from capvl.command import config_arguments
from capvl.data.images.buckets import buckets_in
from capvl.data.reading import loader
from capvl.errors import UserError
from capvl.parallel.mesh import make_mesh
from capvl.parallel.rules import batch_sharding


def measure(recipe: recipes.Recipe, steps: int, every: int) -> dict[str, float | list[float]]:
    """Memory of this process and of its arrays.

    Args:
      recipe: what to train.
      steps: how many.
      every: steps between two looks.

    Returns:
      `resident`: MB of this process at each look; `arrays`: MB of live device arrays at each; `buckets`: how many sizes
      came by; `compilations` of the step; `growth`: MB that the second half of the looks has more than the quarter
      before it, medians of both.

    Raises:
      UserError: fewer than eight looks.
    """
    if steps < 8 * every:
        raise UserError(f"--steps={steps} has to be at least eight times --every={every}.")
    mesh, process = make_mesh(recipe.mesh), psutil.Process()
    looks, sizes = {"resident": [], "arrays": []}, set()
    with jax.set_mesh(mesh):
        step = recipe.train_step()
        recipe.check(mesh)
        state, update = step.make_state(mesh), step.jit(mesh)
        data, sharding = recipe.train_loader(recipe.transforms()), batch_sharding(mesh)
        for number in range(1, steps + 1):
            batch = next(data)
            sizes.add(buckets_in(batch))
            state, _ = update(state, loader.to_device(batch, sharding))
            if number % every == 0:
                jax.block_until_ready(state)
                looks["resident"].append(process.memory_info().rss / 2**20)
                looks["arrays"].append(sum(x.nbytes for x in jax.live_arrays()) / 2**20)
        compilations = update._cache_size()
    return looks | {"buckets": len(sizes), "compilations": compilations, "growth": growth(looks["resident"])}


def growth(looks: list[float]) -> float:
    """What the second half has more than the quarter before it, medians of both."""
    n = len(looks)
    early, late = sorted(looks[n // 4 : n // 2]), sorted(looks[n // 2 :])
    return late[len(late) // 2] - early[len(early) // 2]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m capvl.bench memory", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:variant=value,…")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=25, help="steps between two looks at the memory")
    args, overrides = config_arguments(parser, argv)
    recipe = dataclasses.replace(recipes.load(args.config, overrides), steps=max(args.steps, 1))
    recipe.data.check_prepared()
    found = measure(recipe, args.steps, args.every)
    for i, (resident, arrays) in enumerate(zip(found["resident"], found["arrays"], strict=True), 1):
        print(f"step {i * args.every}: {resident:.0f} MB resident, {arrays:.1f} MB in arrays")
    terminal.say(json.dumps({k: v for k, v in found.items() if not isinstance(v, list)}))


if __name__ == "__main__":
    main()
