"""The benchmark commands.

python -m capvl.bench step --config=configs/cappa_demo.py
python -m capvl.bench encoder --encoder=swin-T/4 --against=timm
python -m capvl.bench deformable --against=torchvision
python -m capvl.bench detection --config=configs/glip_t.py --classes=80
python -m capvl.bench features --config=configs/cappa_flickr8k.py --data=flickr8k:val
python -m capvl.bench data --tars='…/*.tar'
python -m capvl.bench scoring --config=configs/cappa_b16.py --classes=names.txt
python -m capvl.bench generation --config=configs/git_b16.py --images=8
python -m capvl.bench memory --config=configs/git_demo.py --steps=1000
"""

import argparse
import importlib
import sys

from capvl.command import run


def main(argv: list[str] | None = None) -> None:
    """Chooses the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m capvl.bench", description="Benchmarks.")
    known = ("step", "encoder", "deformable", "detection", "data", "features", "scoring", "generation", "memory")
    parser.add_argument("benchmark", choices=known, help="what to measure")
    args = parser.parse_args(argv[:1])
    importlib.import_module(f"capvl.bench.{args.benchmark}").main(argv[1:])


if __name__ == "__main__":
    run(main)
