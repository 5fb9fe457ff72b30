"""Runs evaluators on a checkpoint.

python -m capvl.evaluate runs/cappa_demo
python -m capvl.evaluate runs/cappa_demo --only=perplexity --config.evals.perplexity.split=test
python -m capvl.evaluate runs/cappa_demo --untrained
"""

import argparse
import json

import jax

from capvl import config, storage, terminal, train
from capvl.checkpoint import Checkpointer
from capvl.errors import UserError, nearest
from capvl.evals import Context
from capvl.main import config_arguments
from capvl.parallel.mesh import make_mesh


def evaluate(
    workdir: str, overrides: list[tuple[str, str]] = (), *, only=(), step: int | None = None, untrained: bool = False
) -> dict[str, float]:
    """Results of a run's evaluators by name; they are also appended to workdir/evaluations.jsonl.

    Args:
      workdir: of a run.
      overrides: config keys to change, as on the command line.
      only: names of evaluators; all by default.
      step: of the checkpoint; the newest by default.
      untrained: evaluate the recipe's initial parameters instead: the baseline of every result.

    Raises:
      UserError: no such run, checkpoint, evaluator or data.
    """
    path = storage.folder(workdir)
    file = path / "config.json"
    if not file.exists():
        raise UserError(f"{workdir!r} is no workdir of a run: it has no config.json.")
    values = json.loads(file.read_text())
    for key, text in overrides:
        config.set_key(values, key, text)
    recipe = config.resolve(values)
    for name in only:
        if name not in recipe.evals:
            raise UserError(f"The recipe has no evaluator {name!r}." + nearest(name, recipe.evals))
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        training = recipe.train_step()
        shardings = training.blueprint.shardings(mesh)
        if untrained:
            params, at = train.initial_state(recipe, training, mesh).params, 0
        else:
            params, at = Checkpointer(workdir).read_params(training.param_shapes(), step=step, say=terminal.say)
            params = {k: jax.device_put(v, shardings[k]) for k, v in params.items()}
        context = Context(recipe, mesh, training.blueprint, recipe.batch_size)
        evaluators = {n: e.setup(context) for n, e in recipe.evals.items() if not only or n in only}
        rows = train.evaluate(evaluators, params, path / "evaluate", at)
    terminal.print_results(at, rows)
    if jax.process_index() == 0:
        lines = storage.Lines(path / "evaluations.jsonl")
        lines.append(json.dumps({"step": at, "untrained": untrained, "overrides": list(overrides)} | rows))
        lines.flush()
    return rows


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint.", allow_abbrev=False)
    parser.add_argument("workdir")
    parser.add_argument("--only", action="append", default=[], help="name of an evaluator; may be given again")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--untrained", action="store_true", help="evaluate the initial parameters instead")
    args, overrides = config_arguments(parser, argv)
    evaluate(args.workdir, overrides, only=args.only, step=args.step, untrained=args.untrained)


if __name__ == "__main__":
    from capvl.main import run

    run(main)
