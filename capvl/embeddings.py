"""Embeddings of a locked image tower, computed once for a contrastive run with `objective.cached`.

    python -m capvl.embeddings --config=configs/lit_demo.py --out=scenes_embedded --views=4
    python -m capvl.main --config=configs/lit_demo.py --config.objective.cached=True --config.data.name=scenes_embedded

Each view of an image is a crop (and flip) as in training, a function of (seed, view, index); with a MAP head
that trains, all tokens are kept, else the pooled feature. They are float16 in ArrayRecord files.
"""

import argparse

from capvl.command import config_arguments, run


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m capvl.embeddings",
        description="Cache the embeddings of a locked image tower.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a contrastive recipe with a locked image tower")
    parser.add_argument("--out", required=True, help="name of the new data set")
    parser.add_argument("--views", type=int, default=1, help="crops of each image")
    parser.add_argument("--split", default="train")
    args, overrides = config_arguments(parser, argv)

    from capvl import recipes  # JAX is slow to import, and --help doesn't wait for it.
    from capvl.precompute import write

    recipe = recipes.load(args.config, overrides)
    print(f"{write(recipe, args.out, args.views, args.split)}: {args.views} views of each image")


if __name__ == "__main__":
    run(main)
