"""Indexes tab-separated files (`capvl.data.reading.tsv`).

python -m capvl.data.tsv index images.tsv
"""

import argparse

from capvl.command import run
from capvl.data.reading.tsv import write_index


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m capvl.data.tsv", description="Index a TSV file.", allow_abbrev=False
    )
    parser.add_argument("command", choices=("index",))
    parser.add_argument("files", nargs="+")
    args = parser.parse_args(argv)
    for file in args.files:
        print(f"{file}: {write_index(file)} rows")


if __name__ == "__main__":
    run(main)
