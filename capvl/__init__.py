"""Vision-language pre-training in JAX. The public face, imported when it is first used:

load(path)                      a trained or converted model: embed, caption, score, classify, similarity
LoadedModel                     what it returns
read_recipe(config, overrides)  a checked recipe of a config file
train_recipe(recipe, workdir)   trains it, as `python -m capvl.main` does
evaluate_run(workdir, …)        evaluators on a checkpoint, as `python -m capvl.evaluate` does
UserError                       what is raised where the user can mend it
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "load": "capvl.loading:load",
    "LoadedModel": "capvl.inference.face:LoadedModel",
    "read_recipe": "capvl.recipes:load",
    "train_recipe": "capvl.train:run",
    "evaluate_run": "capvl.evaluation:evaluate",
    "UserError": "capvl.errors:UserError",
}


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'capvl' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
