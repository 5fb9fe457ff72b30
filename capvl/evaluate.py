"""Runs evaluators on a checkpoint.

python -m capvl.evaluate runs/cappa_demo
python -m capvl.evaluate runs/cappa_demo --only=perplexity --config.evals.perplexity.split=test
python -m capvl.evaluate runs/cappa_demo --untrained
python -m capvl.evaluate converted_clip/ --config=configs/evaluate.py
"""

import argparse

from capvl.command import config_arguments, run


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m capvl.evaluate", description="Evaluate a checkpoint.", allow_abbrev=False
    )
    parser.add_argument("workdir", help="of a run, or a converted folder")
    parser.add_argument("--only", action="append", default=[], help="name of an evaluator; may be given again")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--untrained", action="store_true", help="evaluate the initial parameters instead")
    parser.add_argument("--config", default="", help="take data and evaluators from this config")
    parser.add_argument("--trust", action="store_true", help="import the objective and evaluators that a run names")
    args, overrides = config_arguments(parser, argv)

    from capvl.evaluation import evaluate  # JAX is slow to import, and --help doesn't wait for it.
    from capvl.parallel import distributed

    distributed.start()
    evaluate(
        args.workdir,
        overrides,
        only=args.only,
        step=args.step,
        untrained=args.untrained,
        spec=args.config,
        trust=args.trust,
    )


if __name__ == "__main__":
    run(main)
