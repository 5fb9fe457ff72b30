"""What all commands share: errors of the user are one sentence and exit code 2, and `--config.key=value` arguments."""

import argparse
import sys
from collections.abc import Callable

from capvl.errors import UserError

_leave: Callable[[int], None] = sys.exit


def leave_by(function: Callable[[int], None]) -> None:
    """Sets how a process with an error ends: `function(exit code)`, for one whose ordinary end waits for others."""
    global _leave  # noqa: PLW0603 - one process, one end.
    _leave = function


def run(main: Callable[[list[str] | None], None]) -> None:
    """Runs a command: a UserError becomes one line on stderr and exit code 2."""
    try:
        main(None)
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr, flush=True)
        _leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def config_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
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
