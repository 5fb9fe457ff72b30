"""Evaluators over a checkpoint, or over a converted folder."""

import dataclasses

import jax

from capvl import evals, recipes, reporting, storage, terminal, workdirs
from capvl.checkpoint import Checkpointer
from capvl.convert.folder import read_model
from capvl.convert.kinds import KINDS, kind_of
from capvl.convert.load import initial_state
from capvl.data.text import tokenizers
from capvl.errors import UserError, nearest
from capvl.parallel.mesh import make_mesh


def evaluate(
    workdir: str,
    overrides: list[tuple[str, str]] = (),
    *,
    only=(),
    step: int | None = None,
    untrained: bool = False,
    spec: str = "",
    trust: bool = False,
) -> dict[str, float]:
    """Results of evaluators by name; they are also appended to workdir/evaluations.jsonl, when all are there.

    Args:
      workdir: of a run, or a converted folder.
      overrides: config keys to change, as on the command line.
      only: names of evaluators; all by default.
      step: of the checkpoint; the newest by default.
      untrained: evaluate the recipe's initial parameters instead: the baseline of every result.
      spec: config whose data and evaluators are used instead of the run's; a converted folder needs one.
      trust: import the "module:Class" that the workdir names. What `spec` and `overrides` name is imported anyway.

    Raises:
      UserError: no such run, checkpoint, evaluator or data, or code that is not trusted.
    """
    path = storage.folder(workdir)
    converted = (path / "model.json").exists()
    if converted:
        recipe = _converted_recipe(workdir, spec, overrides)
    else:
        recipe = _recipe_of_run(path, workdir, spec, overrides, trust)
    for name in only:
        if name not in recipe.evals:
            raise UserError(f"The recipe has no evaluator {name!r}." + nearest(name, recipe.evals))
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        training = recipe.train_step()
        shardings = training.blueprint.shardings(mesh)
        context = recipe.context(mesh, training.blueprint, path / "evaluate")
        # Opened before the parameters are read: what is wrong with the data is said at once.
        evaluators = {n: e.setup(context) for n, e in recipe.evals.items() if not only or n in only}
        if untrained:
            params, at = initial_state(recipe, training, mesh).params, 0
        elif converted:
            params, at = initial_state(recipe, training, mesh).params | read_model(workdir).params, 0
        else:
            params, at = Checkpointer(workdir).read_params(training.param_shapes(), step=step, say=terminal.say)
        params = {k: jax.device_put(v, shardings[k]) for k, v in params.items()}
        rows, shown = evals.run(evaluators, params)
        by = {"config": spec} if spec else {}
        reporting.save_evaluation(path, at, rows, shown, untrained=untrained, overrides=list(overrides), **by)
    return rows


def _recipe_of_run(path, workdir: str, spec: str, overrides, trust: bool) -> recipes.Recipe:
    """The recipe of a workdir; its data and evaluators by another config where one is given."""
    file = path / "config.json"
    if not file.exists():
        raise UserError(f"{workdir!r} is no workdir of a run: it has no config.json.")
    values = recipes.read_values(file)
    said = {text for _, text in overrides}
    recipe = recipes.resolve(values | {"evals": {}}, trust or said)
    own = workdirs.tokenizer_of(path, recipe)
    values = recipe.source | {"evals": values.get("evals", {})}
    if spec:
        other = recipes.load(spec).source
        values |= {key: other[key] for key in ("data", "evals", "batch_size")}
        said |= recipes.own_code(other)
    if own:
        values["data"] = values["data"] | {"tokenizer": own}
    for key, text in overrides:
        recipes.set_key(values, key, text)
    recipe = recipes.resolve(values, trust or said)
    if own and recipe.data.tokenizer != own:
        tokenizers.check_same_texts(recipe.data.tokenizer_path(), own)
    return recipe


def _converted_recipe(folder: str, spec: str, overrides) -> recipes.Recipe:
    """A config's recipe around a converted model, with the model's own tokenizer."""
    if not spec:
        raise UserError(f"{folder!r} is a converted model: --config=FILE.py has to say which data and evaluators.")
    weights = read_model(folder)
    values = recipes.load(spec).source | {"init_from": "", "init_only": []}
    kind = KINDS[kind_of(weights.options)]
    objective = kind.objective_for(weights.options)
    if not objective:
        raise UserError(f"{folder!r} has no image tower to evaluate.")
    values["objective"] = objective
    values["model"] = dataclasses.asdict(weights.options) | kind.model
    values["data"] |= {name: getattr(weights, name) for name in ("crop", "crop_fraction", "interpolation")}
    if weights.tokenizer:
        values["data"]["tokenizer"] = weights.tokenizer
    for key, text in overrides:
        recipes.set_key(values, key, text)
    return recipes.resolve(values)
