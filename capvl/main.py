"""Trains a recipe.

    python -m capvl.main --config=configs/cappa_demo.py [--workdir=…] [--config.key=value …]

A second start with the same workdir resumes. Errors of the user are one line and exit code 2.
"""

import argparse

from capvl.command import config_arguments, run


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m capvl.main", description="Train a recipe.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:variant=value,…")
    parser.add_argument("--workdir", default="", help="checkpoints, metrics and report; default: runs/NAME")
    parser.add_argument("--new_data", action="store_true", help="resume although the data is not what it was")
    args, overrides = config_arguments(parser, argv)

    from capvl import recipes  # JAX is slow to import, and --help doesn't wait for it.
    from capvl.parallel import distributed

    distributed.start()
    recipe = recipes.load(args.config, overrides)

    from capvl import train  # A config, recipes's mistakes are said before orbax, which is slow to import, comes.

    train.run(recipe, args.workdir or recipes.default_workdir(args.config), new_data=args.new_data)


if __name__ == "__main__":
    run(main)
