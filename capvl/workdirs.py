"""A run's workdir: of which recipe it is, and its own tokenizer, so that it is whole wherever it is taken."""

import dataclasses
import hashlib
import json
import os

import jax
from etils import epath

from capvl import recipes, storage
from capvl.data.text import tokenizers
from capvl.data.text.cleaning import SETTINGS
from capvl.errors import UserError
from capvl.models.abilities import READERS, abilities
from capvl.parallel import distributed


def check(path: epath.Path, recipe: recipes.Recipe, *, finished: bool = False) -> None:
    """Checks that a workdir is of this recipe where anything of it was trained.

    Args:
      path: of the workdir.
      recipe: of the run.
      finished: its results are taken, whether anything was trained or not: what they depend on must be the same.

    Raises:
      UserError: it is of another recipe.
    """
    file = path / "config.json"
    if file.exists() and (finished or _begun(path)):
        # The tokenizer is compared by what is in it.
        moved = ("data.tokenizer",) if find_tokenizer(path) else ()
        recipes.check_same(
            _with_defaults(recipes.read_values(file), recipe), recipe.source, str(path), moved, finished=finished
        )


def _with_defaults(values: dict, recipe: recipes.Recipe) -> dict:
    """A workdir's plain values, with the defaults of keys that were not there yet when it was begun."""
    try:
        # Evaluators may differ, and what the recipe itself names may be imported.
        resolved = recipes.resolve(values | {"evals": {}}, recipes.own_code(recipe.source))
        return resolved.source | {"evals": values.get("evals", {})}
    except UserError:  # Of another objective, or with keys that are gone: compared as it stands.
        return values


def _begun(path: epath.Path) -> bool:
    """Whether anything was trained there."""
    metrics, checkpoints = path / "metrics.jsonl", path / "checkpoints"
    return (metrics.exists() and metrics.stat().length > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def write(path: epath.Path, recipe: recipes.Recipe, tokenizer: str) -> None:
    """Writes config.json and a copy of the tokenizer, which stays the same once anything was trained.

    Args:
      path: of the workdir.
      recipe: whose workdir it is.
      tokenizer: path of its tokenizer; "" for none.

    Raises:
      UserError: there is another tokenizer, hosts differ, or it can't be written.
    """
    if tokenizer:
        _keep_tokenizer(path, tokenizer)
    if jax.process_index() == 0:
        storage.replace_text(path / "config.json", json.dumps(recipe.source, indent=1))


def find_tokenizer(path: epath.Path) -> epath.Path | None:
    """The tokenizer's file in a workdir; None where it has none, as of a recipe without texts.

    Raises:
      UserError: there are several.
    """
    found = [path / name for name in tokenizers.COPIES if (path / name).is_file()]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise UserError(f"There are {names} in {str(path)!r}, and a run has one tokenizer; remove what is not its own.")
    return found[0] if found else None


def tokenizer_of(path: epath.Path, recipe: recipes.Recipe) -> str:
    """The local path of the tokenizer that a workdir's model was trained with.

    Args:
      path: of the workdir.
      recipe: of the workdir, whose path is taken where the workdir has no copy.

    Returns:
      A path, "" where there is none, or it is gone.
    """
    copy = find_tokenizer(path)
    if copy:
        return tokenizers.local(copy)
    named = tokenizer_named(recipe)
    return named if os.path.isfile(named) else ""


def tokenizer_named(recipe: recipes.Recipe) -> str:
    """Path of the tokenizer that a recipe names; "" where it has none, or a model without texts."""
    if not abilities(recipe.model) & READERS:
        return ""
    try:
        return recipe.data.tokenizer_path()
    except UserError:
        return ""


def with_tokenizer(path: epath.Path, recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe, with the workdir's tokenizer where the one that it names is gone.

    Its plain values stay as they are.
    """
    copy = find_tokenizer(path)
    if copy is None or os.path.isfile(tokenizer_named(recipe)):
        return recipe
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=tokenizers.local(copy)))


def _keep_tokenizer(path: epath.Path, tokenizer: str) -> None:
    files = tokenizers.copies(tokenizer)
    distributed.check_same(tokenizer=hashlib.sha256(b"".join(files.values())).hexdigest())
    copy = find_tokenizer(path)
    kept = [file for file in (copy, path / SETTINGS) if file and file.is_file()]
    if copy and {file.name: file.read_bytes() for file in kept} == files:
        return
    if copy and _begun(path):
        _check_copy(copy)
        raise UserError(
            f"Tokenizer {tokenizer!r} is not the one that the run in {str(path)!r} was begun with ({copy.name} there); "
            f"give that one, or choose another --workdir."
        )
    if jax.process_index() == 0:
        for file in kept:
            file.unlink(missing_ok=True)
        for name, data in files.items():
            storage.replace_bytes(path / name, data)


def _check_copy(copy: epath.Path) -> None:
    """Raises UserError where a workdir's tokenizer can't be read."""
    try:
        tokenizers.load(tokenizers.local(copy))
    except UserError as e:
        raise UserError(
            f"{e} Remove it where the recipe's tokenizer is the run's; a copy of that takes its place."
        ) from e
