"""The benchmark commands.

python -m capvl.bench step --config=configs/cappa_demo.py
python -m capvl.bench data --tars='…/*.tar'
"""

import argparse
import sys


def main(argv: list[str] | None = None) -> None:
    """Chooses the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m capvl.bench", description="Benchmarks.")
    parser.add_argument("benchmark", choices=("step", "data"), help="the train step, or the input pipeline")
    args = parser.parse_args(argv[:1])
    if args.benchmark == "step":
        from capvl.bench import step

        step.main(argv[1:])
    else:
        from capvl.bench import data

        data.main(argv[1:])


if __name__ == "__main__":
    from capvl.main import run

    run(main)
