"""Speed of a recipe's train step on the devices that are here, with made-up batches."""

import argparse
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capvl import chips, recipes
from capvl.bench import costs
from capvl.command import config_arguments
from capvl.data.reading import loader
from capvl.parallel.mesh import make_mesh
from capvl.parallel.rules import batch_sharding


def matmul_rate(seconds: float = 1.0) -> float:
    """FLOP/s of a bare float32 matmul, 1568 x 768 x 3072, on the default device."""
    m, k, n = 1568, 768, 3072
    a, b = jnp.ones((m, k), jnp.float32), jnp.ones((k, n), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    multiply(a, b).block_until_ready()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        multiply(a, b).block_until_ready()
        count += 1
    return 2 * m * k * n * count / (time.perf_counter() - begin)


def example_batch(recipe, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Random images, and texts of `tokens` tokens on average (uniform in half to one and a half times that)."""
    rng = np.random.default_rng(seed)
    specs, vocab = recipe.batch_spec(), getattr(recipe.model, "vocab", 0)
    if isinstance(next(iter(specs.values())), dict):
        return {kind: _example_batch(spec, vocab, tokens, rng) for kind, spec in specs.items()}
    return _example_batch(specs, vocab, tokens, rng)


def _example_batch(specs, vocab: int, tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    batch = {}
    for name, spec in specs.items():
        if spec.dtype == np.uint8:
            batch[name] = rng.integers(0, 256, spec.shape, np.uint8)
        elif spec.dtype == np.bool_:
            batch[name] = np.full(spec.shape, name not in ("flip", "cut"))  # Masks: all is there.
        elif name != "text":  # Lengths of prompts, labels: none, and the first.
            batch[name] = np.zeros(spec.shape, spec.dtype)
        else:
            length = spec.shape[-1]
            lengths = rng.integers(max(1, tokens // 2), min(length, tokens + tokens // 2) + 1, spec.shape[:-1])
            ids = rng.integers(2, vocab, spec.shape)
            batch[name] = np.where(np.arange(length) < lengths[..., None], ids, 0).astype(np.int32)
    return batch


def measure(recipe, tokens: int, steps: int, show_costs: int = 0) -> dict[str, float]:
    """Times of one recipe's step.

    Args:
      recipe: what to run.
      tokens: mean length of the made-up texts.
      steps: how many are timed.
      show_costs: so many of the lines of source with the largest costs are printed.

    Returns:
      Median seconds a step, images/s, seconds until a dispatch returns and seconds of other host
      work a step, compile seconds, bytes of arguments, temporaries and their peak, and the share
      of a bare matmul's rate (the MFU, where the chip's peak is known) in analytic FLOPs.
    """
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        step = recipe.train_step()
        recipe.check(mesh)
        state = step.make_state(mesh)
        host_batch = example_batch(recipe, tokens)
        next_batch = functools.partial(loader.to_device, host_batch, batch_sharding(mesh))
        batch = next_batch()
        update = step.jit(mesh)
        begin = time.perf_counter()
        lowered = update.lower(state, batch)
        compiled = lowered.compile()
        compile_seconds = time.perf_counter() - begin
        memory = compiled.memory_analysis()
        update(state, batch)[0].step.block_until_ready()
        state = step.make_state(mesh)
        state, times, dispatch, rest = _timed(update, state, next_batch, steps)
        if show_costs:
            _print_costs(lowered, state, batch, show_costs)
    seconds = float(np.median(times))
    work = recipe.objective.flops(recipe.model) * recipe.batch_size / seconds
    out = {
        "seconds_per_step": seconds,
        "images_per_second": recipe.batch_size / seconds,
        "dispatch_seconds": float(np.median(dispatch)),
        "host_seconds_besides": float(np.median(rest)),
        "compile_seconds": compile_seconds,
        "flops_per_second": work,
        "argument_bytes": float(memory.argument_size_in_bytes),
        "temporary_bytes": float(memory.temp_size_in_bytes),
    }
    stats = jax.local_devices()[0].memory_stats() or {}
    out["peak_bytes"] = float(stats.get("peak_bytes_in_use", out["argument_bytes"] + out["temporary_bytes"]))
    if peak := chips.peak_flops(jax.devices()[0].device_kind):
        out["mfu"] = work / (peak * mesh.size)
    elif jax.default_backend() == "cpu":
        out["matmul_flops_per_second"] = matmul_rate()
        out["share_of_matmul"] = work / out["matmul_flops_per_second"]
    return out


def _timed(update, state, next_batch, steps: int):
    """(the last state, seconds of each step, of each dispatch, of the host's other work a step).

    As in the training loop the host is one step ahead: a step's metrics are read when the next is under way.
    """
    times, dispatch, rest, previous, batch = [], [], [], None, next_batch()
    jax.block_until_ready((state, batch))
    end = time.perf_counter()
    for _ in range(steps + 1):
        begin = time.perf_counter()
        state, metrics = update(state, batch)
        dispatch.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        batch = next_batch()
        rest.append(time.perf_counter() - begin)
        if previous is not None:
            jax.block_until_ready(previous)
            times.append(time.perf_counter() - end)
            end = time.perf_counter()
            {k: float(v) for k, v in jax.device_get(previous).items()}
            rest[-1] += time.perf_counter() - end
        previous = metrics
    return jax.block_until_ready(state), times, dispatch, rest


def _print_costs(lowered, state, batch, count: int) -> None:
    """Where the time of a step goes, by line of the source."""
    # A GPU's recorded graphs hide the kernels inside them, so the step is compiled once more without.
    gpu = jax.default_backend() == "gpu"
    compiled = lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": ""} if gpu else None)

    def run():
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, batch))

    run()
    for cost in costs.measure(run, compiled.as_text(), times=3)[:count]:
        print(f"{cost.share:6.1%} {cost.seconds * 1e3:9.3f} ms  {cost.where}")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m capvl.bench step", allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=10, help="steps to time")
    parser.add_argument("--tokens", type=int, default=16, help="mean length of the made-up texts")
    parser.add_argument("--costs", type=int, default=0, help="print so many of the costliest lines of the source")
    parser.add_argument("--json", default="", help="also write the numbers to this file")
    args, overrides = config_arguments(parser, argv)
    recipe = recipes.load(args.config, overrides)
    numbers = measure(recipe, min(args.tokens, recipe.model.length), args.steps, args.costs)
    for name, value in numbers.items():
        print(f"{name:28s} {value:,.4f}" if value < 1e4 else f"{name:28s} {value:,.0f}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(numbers, file, indent=1)
