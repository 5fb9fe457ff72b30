"""Trains a recipe.

    python -m capvl.main --config=configs/cappa_demo.py [--workdir=…] [--config.key=value …]

A second start with the same workdir resumes. Errors of the user are one line and exit code 2.
"""

import argparse
import sys
from collections.abc import Callable


def run(main: Callable[[list[str] | None], None]) -> None:
    """Runs a command: a UserError becomes one line on stderr and exit code 2."""
    from capvl.errors import UserError

    try:
        main(None)
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr, flush=True)
        if "jax" in sys.modules:
            from capvl.parallel import distributed

            distributed.leave(2)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def config_arguments(parser: argparse.ArgumentParser, argv: list[str] | None):
    """Parses arguments, with any number of `--config.key=value` overrides.

    Returns:
      (namespace, overrides as a list of (key, text)).
    """
    args, rest = parser.parse_known_args(argv)
    overrides = []
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--config."):
            parser.error(f"unknown argument {argument!r}")
        key, equals, text = argument[len("--config.") :].partition("=")
        if not equals:
            if not rest:
                parser.error(f"{argument} needs a value")
            text = rest.pop(0)
        overrides.append((key, text))
    return args, overrides


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train a recipe.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:variant=value,…")
    parser.add_argument("--workdir", default="", help="checkpoints, metrics and report; default: runs/NAME")
    parser.add_argument("--new_data", action="store_true", help="resume although the data is not what it was")
    args, overrides = config_arguments(parser, argv)

    from capvl import config
    from capvl.parallel import distributed

    distributed.start()
    recipe = config.load(args.config, overrides)

    from capvl import train

    train.run(recipe, args.workdir or config.default_workdir(args.config), new_data=args.new_data)


if __name__ == "__main__":
    run(main)
