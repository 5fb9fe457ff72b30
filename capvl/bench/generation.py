"""How fast text is written: with the key-value cache and in batches, beside recomputing every step, one by one.

python -m capvl.bench generation --config=configs/git_b16.py --config.model.dtype=float32 --images=8 --length=40
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from capvl import recipes
from capvl.command import config_arguments
from capvl.decoding.generate import Decoding, generate
from capvl.errors import UserError
from capvl.models.abilities import Ability, require

NEVER = -1  # An end that is never written: every text has the full length.


def measure(recipe: recipes.Recipe, images: int, length: int, beams: int) -> dict[str, float]:
    """Texts a second: `recomputed`: one image at a time, each step a pass over image tokens and text (of the average
    length); `recomputed in batches`; `cached`: one at a time; `cached in batches`; `beams`: the last with beam search.

    Images are encoded before. The parameters are random.
    """
    blueprint = recipe.train_step().blueprint
    params = jax.jit(blueprint.init)(jax.random.key(0))
    options = recipe.model
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.uniform(-1, 1, (images, *options.image_shape())), jnp.float32)
    encoded = jax.jit(lambda p, x: blueprint.bind(p).encode(x))(params, pixels)
    middle = jnp.asarray(rng.integers(1, options.vocab, (images, (length + 1) // 2)), jnp.int32)

    @jax.jit
    def step(params, encoded, text):
        model = blueprint.bind(params)
        hidden = model.decoder.causal(text, model.decoder.image_kv(encoded), dtype=model.dtype)
        return model.decoder.project(hidden[:, -1:])[:, 0].argmax(axis=-1)

    def writer(decoding):
        @jax.jit
        def write(params, encoded):
            model = blueprint.bind(params)
            return generate(model, model.decoder.image_kv(encoded), length, NEVER, decoding)[0]

        return write

    greedy, searched = writer(Decoding()), writer(Decoding(beams=beams))
    # (images, how often it is done for a text, what is done)
    runs = {
        "recomputed": (1, length, lambda: step(params, encoded[:1], middle[:1])),
        "recomputed in batches": (images, length, lambda: step(params, encoded, middle)),
        "cached": (1, 1, lambda: greedy(params, encoded[:1])),
        "cached in batches": (images, 1, lambda: greedy(params, encoded)),
        "beams": (images, 1, lambda: searched(params, encoded)),
    }
    return {name: rows / (times * _seconds(run)) for name, (rows, times, run) in runs.items()}


def _seconds(run) -> float:
    """Seconds of a call after the first, the shortest of three."""
    jax.block_until_ready(run())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m capvl.bench generation", allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--length", type=int, default=0, help="tokens of a text; default: the model's")
    parser.add_argument("--beams", type=int, default=4)
    args, overrides = config_arguments(parser, argv)
    recipe = recipes.load(args.config, overrides)
    require(recipe.model, "capvl.bench generation", Ability.DECODER)
    length, most = args.length or recipe.model.length, recipe.model.text_positions
    if not 1 <= length <= most or args.images < 1 or args.beams < 2:
        raise UserError(f"--length must be 1 to {most}, --images at least 1 and --beams at least 2.")
    found = measure(recipe, args.images, length, args.beams)
    print(f"{args.config}: {length} tokens, batches of {args.images}, {jax.default_backend()}")
    for name, rate in found.items():
        title = f"beams ({args.beams}), cached in batches" if name == "beams" else name
        print(f"{title:36s} {rate:10.2f} texts/s {rate * length:12,.1f} tokens/s {rate / found['recomputed']:8.1f} x")
