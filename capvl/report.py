"""One self-contained HTML page of one or several runs: curves, results, written captions.

python -m capvl.report runs/a runs/b --out=report.html
"""

import argparse

from capvl.command import run


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m capvl.report", description="Draw one or several runs into one HTML page.", allow_abbrev=False
    )
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument("--out", default="report.html")
    args = parser.parse_args(argv)

    from etils import epath  # JAX is slow to import, and --help doesn't wait for it.

    from capvl import storage
    from capvl.reporting import write

    print(f"Report: {write([storage.folder(w) for w in args.workdirs], epath.Path(args.out))}")


if __name__ == "__main__":
    run(main)
