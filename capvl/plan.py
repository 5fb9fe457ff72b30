"""Plans a recipe for TPUs that aren't here: does it fit, what does a step do, how fast can it be?

    python -m capvl.plan --config=configs/cappa_l16.py --topology=v5e:16x16 [--topology=…] [--search]

The train step is compiled ahead of time by libtpu (extra `tpu`), which needs no TPU;
--analytic plans on paper, without a compiler.
"""

import argparse

from capvl.command import config_arguments, run
from capvl.planning.libtpu import prepare_environment


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args, overrides = _arguments(argv)
    prepare_environment()
    # JAX reads the environment when it is imported; that is slow, and --help doesn't wait for it.
    from capvl.planning.tables import plan_all

    plan_all(args, overrides)


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m capvl.plan", description="Plan a recipe.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:variant=value,…")
    parser.add_argument("--topology", action="append", required=True, help="such as v5e:16x16; may be repeated")
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology")
    parser.add_argument("--analytic", action="store_true", help="on paper, without a compiler")
    parser.add_argument("--search", action="store_true", help="try remat policies and per-chip batches")
    parser.add_argument("--batches", default="16,32,64,128", help="per-chip batches that --search tries")
    parser.add_argument("--remats", default="none,named,full", help="remat policies that --search tries")
    parser.add_argument("--wait", type=float, default=600.0, help="seconds to wait for libtpu's lock")
    parser.add_argument("--json", default="", help="also write the plans to this file")
    return config_arguments(parser, argv)


if __name__ == "__main__":
    run(main)
