"""Images a second of a detector, whose classes are encoded once, beside one that reads its text with every image.

python -m capvl.bench detection --config=configs/glip_t.py --classes=80 --batch=1

The parameters, images and words are random: a class has two tokens, and one stands between two of them.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from capvl import recipes
from capvl.command import config_arguments
from capvl.errors import UserError
from capvl.inference.detecting import Prompts, detect, states_of
from capvl.models.abilities import Ability, require
from capvl.models.glip import COARSEST, GlipOptions

WORDS = 2


def prompts(options: GlipOptions, classes: int) -> Prompts:
    """Prompts of so many classes, as few as hold them: R is 1 (`capvl.inference.detecting.Prompts`).

    Raises:
      UserError: the model reads no texts.
    """
    if options.classes:
        raise UserError("capvl.bench detection needs a model that reads texts; this one has a closed list of classes.")
    room = (options.length - 1) // (WORDS + 1)  # The first token is the start.
    texts, most = -(-classes // room), min(room, classes)
    tokens = np.random.default_rng(0).integers(1, options.vocab, (1, texts, options.length), dtype=np.int32)
    weights, label = np.zeros((1, texts, options.length, most), np.float32), np.full((1, texts, most), -1, np.int32)
    for number in range(classes):
        text, k = divmod(number, room)
        first = 1 + k * (WORDS + 1)
        weights[0, text, first : first + WORDS, k] = 1 / WORDS
        label[0, text, k] = number
    tokens[0, -1, 1 + (WORDS + 1) * (classes - (texts - 1) * room) :] = 0
    return Prompts(tokens, weights, label)


def measure(recipe: recipes.Recipe, classes: int, batch: int, size: tuple[int, int], calls: int) -> dict[str, float]:
    """Images a second: `once`, the classes encoded before; `each`, encoded with every image. Both are called in turn,
    and the fastest call counts.

    Args:
      classes: how many are looked for.
      batch: images of a call.
      size: their height and width in pixels.
      calls: of each.
    """
    blueprint, asked = recipe.train_step().blueprint, prompts(recipe.model, classes)
    rng = np.random.default_rng(1)
    params = {k: jnp.asarray(0.02 * rng.normal(size=s.shape), jnp.float32) for k, s in blueprint.shapes.items()}
    params = {k: v + 1.0 if k.endswith("scale") else v for k, v in params.items()}
    image = rng.uniform(-1, 1, (batch, *size, 4)).astype(np.float32)
    image[..., 3] = 1.0
    whole = np.tile(np.int32(size), (batch, 1))
    rows = {"image": jnp.asarray(image), "size": jnp.asarray(whole), "whole": jnp.asarray(whole)}
    own = Prompts(*(jnp.asarray(np.repeat(x, batch, axis=0)) for x in asked))
    states = jax.jit(lambda p, tokens: states_of(blueprint.bind(p), tokens))(params, asked.tokens_RPL)
    once = jax.jit(lambda p: detect(blueprint.bind(p), rows, asked, states))
    each = jax.jit(lambda p, own: detect(blueprint.bind(p), rows, own))
    seconds = {"once": [], "each": []}
    for _ in range(calls + 1):  # The first one compiles.
        for name, function in (("once", lambda: once(params)), ("each", lambda: each(params, own))):
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: batch / min(own[1:]) for name, own in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m capvl.bench detection", allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--classes", type=int, default=80, help="how many are looked for")
    parser.add_argument("--batch", type=int, default=1, help="images of a call")
    parser.add_argument("--size", default="", help="HEIGHTxWIDTH of them in pixels; default: the model's sides")
    parser.add_argument("--calls", type=int, default=3, help="of each, the fastest of which counts")
    args, overrides = config_arguments(parser, argv)
    recipe = recipes.load(args.config, overrides)
    require(recipe.model, "capvl.bench detection", Ability.DETECTS)
    if min(args.classes, args.batch, args.calls) < 1:
        raise UserError("--classes, --batch and --calls should be at least 1.")
    found = measure(recipe, args.classes, args.batch, _size(args.size, recipe.model), args.calls)
    for name, what in (("once", "classes encoded once"), ("each", "a text with each image")):
        print(f"{what:22s} {found[name]:8.3f} images/s")
    print(f"{'ratio':22s} {found['once'] / found['each']:8.3f}")


def _size(text: str, options: GlipOptions) -> tuple[int, int]:
    if not text:
        height, width = (-(-side // COARSEST) * COARSEST for side in (options.res, options.max_side))
        return height, width
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % COARSEST == 0 for side in sides):
        raise UserError(f"--size={text} should be HEIGHTxWIDTH, both multiples of {COARSEST}.")
    return int(sides[0]), int(sides[1])
