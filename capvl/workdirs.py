"""A run's workdir: of which recipe it is, and its own tokenizer, so that it is whole wherever it is taken."""

import dataclasses
import hashlib
import json
import os

import jax
from etils import epath

from capvl import config, storage
from capvl.data import tokenizer as tokenizers
from capvl.errors import UserError
from capvl.parallel import distributed


def check(path: epath.Path, recipe: config.Recipe) -> None:
    """Checks that a workdir is of this recipe where anything of it was trained.

    Raises:
      UserError: it is of another recipe.
    """
    file = path / "config.json"
    if file.exists() and _begun(path):
        # The tokenizer is compared by what is in it.
        moved = ("data.tokenizer",) if find_tokenizer(path) else ()
        config.check_same(_with_defaults(config.read_values(file), recipe), recipe.source, str(path), moved)


def _with_defaults(values: dict, recipe: config.Recipe) -> dict:
    """A workdir's plain values, with the defaults of keys that were not there yet when it was begun."""
    try:
        # Evaluators may differ, and what the recipe itself names may be imported.
        return config.resolve(values | {"evals": {}}, config.own_code(recipe.source)).source
    except UserError:  # Of another objective, or with keys that are gone: compared as it stands.
        return values


def _begun(path: epath.Path) -> bool:
    """Whether anything was trained there."""
    metrics, checkpoints = path / "metrics.jsonl", path / "checkpoints"
    return (metrics.exists() and metrics.stat().length > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def write(path: epath.Path, recipe: config.Recipe, tokenizer: str) -> None:
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
    """The tokenizer's file in a workdir; None where it has none, as of a recipe without texts."""
    found = [file for file in path.glob("tokenizer.*") if file.suffix != ".tmp"]
    return found[0] if found else None


def tokenizer_of(path: epath.Path, recipe: config.Recipe) -> str:
    """The local path of the tokenizer that a workdir's model was trained with.

    Args:
      path: of the workdir.
      recipe: of the workdir, whose path is taken where the workdir has no copy.

    Returns:
      A path, "" where there is none.
    """
    copy = find_tokenizer(path)
    if copy:
        return tokenizers.local(copy)
    return tokenizer_named(recipe)


def tokenizer_named(recipe: config.Recipe) -> str:
    """Path of the tokenizer that a recipe names; "" where it has none, or a model without texts."""
    if not hasattr(recipe.model, "vocab"):
        return ""
    try:
        return recipe.data.tokenizer_path()
    except UserError:
        return ""


def with_tokenizer(path: epath.Path, recipe: config.Recipe) -> config.Recipe:
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
    if copy and all((path / name).exists() and (path / name).read_bytes() == data for name, data in files.items()):
        return
    if copy and _begun(path):
        raise UserError(
            f"Tokenizer {tokenizer!r} is not the one that the run in {str(path)!r} was begun with ({copy.name} there); "
            f"give that one, or choose another --workdir."
        )
    if jax.process_index() == 0:
        if copy:
            copy.unlink(missing_ok=True)
        for name, data in files.items():
            storage.replace_bytes(path / name, data)
