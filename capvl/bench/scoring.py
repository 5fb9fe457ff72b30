"""What zero-shot classification by likelihood costs an image, beside scoring every pair from scratch.

python -m capvl.bench scoring --config=configs/cappa_b16.py --classes=imagenet_classes.txt --tokenizer=c4.model
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from capvl import recipes
from capvl.command import config_arguments
from capvl.data.text import tokenizers
from capvl.decoding.likelihood import log_likelihood
from capvl.inference.scoring import NODES, TextScorer
from capvl.lines import read_lines
from capvl.models import flops
from capvl.nn.padding import lengths


def count(options, tokens: np.ndarray, nodes: int = NODES) -> dict[str, float]:
    """Matmul FLOPs an image on paper: `pairs` (image and full-length text for every class), `image once` (texts at
    full length), and `tree`, with its `nodes` (padding included), `trees` and the `tokens` of all names.

    Args:
      options: of a model with a decoder.
      tokens: (C, L) of the class names.
      nodes: see `capvl.decoding.trie.split`.
    """
    scorer = TextScorer(tokens, nodes=nodes)
    one = scorer.trees[0]
    # The logits of a tree's edges are dot products of a state and a row of the output layer.
    tree = options.text_flops(len(one.inputs)) + flops.dense(len(one.tokens), options.decoder_size.width, 1)
    encoder, kv, text = options.encoder_flops(), options.image_kv_flops(), options.text_flops()
    return {
        "pairs": len(tokens) * (encoder + kv + text),
        "image once": encoder + kv + len(tokens) * text,
        "tree": encoder + kv + len(scorer.trees) * tree,
        "nodes": float(len(scorer.trees) * len(one.inputs)),
        "trees": float(len(scorer.trees)),
        "tokens": float(lengths(tokens).sum()),
    }


def measure(recipe: recipes.Recipe, tokens: np.ndarray, images: int) -> dict[str, float]:
    """Seconds an image by the tree, seconds a pair from scratch, and the largest difference of both scores in nats.

    The parameters are random. From scratch as many classes are scored as there are images.
    """
    blueprint = recipe.train_step().blueprint
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(0.1 * rng.normal(size=s.shape), jnp.float32) for k, s in blueprint.shapes.items()}
    params = {k: v + 1.0 if k.endswith("scale") else v for k, v in params.items()}
    res = recipe.model.res
    image = jnp.asarray(rng.uniform(-1, 1, (images, res, res, 3)), jnp.float32)
    scorer = TextScorer(tokens)
    by_tree = jax.jit(lambda p, i: scorer(blueprint.bind(p), i))
    pairs = jax.jit(lambda p, i, t: log_likelihood(blueprint.bind(p), i, t))
    some = rng.choice(len(tokens), min(len(tokens), 2 * images), replace=False)

    def run_pairs():
        return np.stack(
            [
                pairs(params, image, jnp.broadcast_to(jnp.asarray(tokens[c])[None], (images, tokens.shape[1])))
                for c in some
            ],
            1,
        )

    found, expected = np.asarray(by_tree(params, image)), run_pairs()
    seconds = []
    for function in (lambda: jax.block_until_ready(by_tree(params, image)), run_pairs):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds_an_image": seconds[0] / images,
        "seconds_a_pair": seconds[1] / images / len(some),
        "largest_difference": float(np.abs(found[:, some] - expected).max()),
        "largest_score": float(np.abs(expected).max()),
    }


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m capvl.bench scoring", allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--classes", required=True, help="file of class names")
    parser.add_argument("--tokenizer", default="", help="instead of the recipe's")
    parser.add_argument("--images", type=int, default=0, help="measure on so many images, too")
    args, overrides = config_arguments(parser, argv)
    recipe = recipes.load(args.config, overrides)
    tokenizer = tokenizers.load(args.tokenizer or recipe.data.tokenizer_path())
    names = [name.replace("_", " ") for name in read_lines(args.classes, "class names")]
    tokens = np.stack([tokenizer(name, recipe.model.length) for name in names])
    found = count(recipe.model, tokens)
    nodes = f"{found['nodes']:.0f} nodes of {found['trees']:.0f} trees"
    print(f"{len(names)} classes, {found['tokens']:.0f} tokens in {nodes}")
    for name in ("pairs", "image once", "tree"):
        print(f"{name:12s} {found[name] / 1e9:12.1f} GFLOP an image   1/{found['pairs'] / found[name]:.1f}")
    if args.images:
        times = measure(recipe, tokens, args.images)
        whole = times["seconds_a_pair"] * len(names)
        print(
            f"measured: {times['seconds_an_image']:.3f} s an image by trees, {whole:.1f} s from scratch "
            f"({times['seconds_a_pair'] * 1e3:.1f} ms a pair), 1/{whole / times['seconds_an_image']:.1f}; largest "
            f"difference {times['largest_difference']:.1e} nats of {times['largest_score']:.0f}"
        )
