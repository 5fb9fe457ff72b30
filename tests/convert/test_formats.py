"""The tables of conversions and kinds: whole, light to import, and enough for a new model."""

import dataclasses
import inspect
import pkgutil
import subprocess
import sys
import types

import numpy as np
import pytest
from test_convert import MODELS, weights_of

import capvl.convert
from capvl.convert import files, formats, kinds
from capvl.convert.formats import FORMATS, Format
from capvl.errors import UserError
from capvl.objectives.probe import ProbeOptions
from capvl.recipes import resolve


@pytest.mark.parametrize("entry", FORMATS, ids=lambda f: f"{f.framework} {f.model_type}")
def test_an_entry_has_what_it_names(entry):
    module = entry.module()
    several = sum(f.framework == entry.framework and f.writes for f in FORMATS) > 1
    wanted = {"read": entry.reads, "write": entry.writes, "fits": entry.writes and several}
    assert {name: callable(getattr(module, name, None)) for name in wanted} == wanted


def test_every_reader_and_writer_has_an_entry():
    listed = {f.file for f in FORMATS}
    for module in pkgutil.iter_modules(capvl.convert.__path__):
        if module.name in ("__main__", "formats"):
            continue
        found = __import__(f"capvl.convert.{module.name}", fromlist=["*"])
        for name, first in (("read", "source"), ("write", "weights")):
            function = getattr(found, name, None)
            if function is not None and next(iter(inspect.signature(function).parameters)) == first:
                assert module.name in listed, module.name


def test_help_waits_for_no_slow_library():
    script = "import sys; from capvl.convert import __main__; print({'jax', 'flax', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_new_model_type_is_a_file_and_an_entry(monkeypatch, tmp_path):
    """Of two model types, config.json names the one that reads, and the model the one that writes."""
    written = []
    for name in ("big", "small"):
        module = types.ModuleType(f"capvl.convert.{name}")
        module.read = lambda source, name=name: (name, source.arrays["a"].sum(), source.heads)
        module.fits = lambda options, name=name: options == name
        module.write = lambda weights, target, name=name: written.append((name, target.path))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(formats, "FORMATS", (Format("toy", "big", "big"), Format("toy", "small", "small"), *FORMATS))
    files.write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(3, np.float32)})
    (tmp_path / "config.json").write_text('{"model_type": "small"}')
    assert formats.read("toy", str(tmp_path), heads=2) == ("small", 3, 2)
    formats.write("toy", "out", types.SimpleNamespace(options="big"))
    assert written == [("big", "out")]
    (tmp_path / "config.json").write_text('{"model_type": "huge"}')
    with pytest.raises(UserError, match="model_type is one of big, small; found 'huge'"):
        formats.read("toy", str(tmp_path))
    with pytest.raises(UserError, match="toy has no form of this model"):
        formats.write("toy", "out", types.SimpleNamespace(options="none"))


def test_kinds_are_evaluated_by_what_builds_their_model(tiny):
    """The objective of a kind takes the kind's options."""
    for name, kind in kinds.KINDS.items():
        options = next(o for o in MODELS.values() if kinds.kind_of(o) == name)
        objective = kind.objective_for(options)
        assert bool(objective) == (name != "bert")
        if objective:
            model = dataclasses.asdict(options) | kind.model
            recipe = resolve(tiny(objective=objective, model=model))
            assert dataclasses.asdict(recipe.model).items() >= model.items()


@pytest.mark.parametrize(
    "framework, options, words",
    [
        ("capvl", ProbeOptions(classes=3), "models of the kinds captioner.*this one has ProbeOptions"),
        ("stablehlo", MODELS["bert"], "Only models with an image tower"),
        ("timm", MODELS["bert"], "image models only"),
        ("big_vision", MODELS["bert"], "no form of this BERT"),
        ("big_vision", MODELS["git"], "big_vision has no model with decoder/"),
        ("huggingface", dataclasses.replace(MODELS["git"], norm="pre"), "model.norm='post'"),
    ],
)
def test_models_without_such_a_form(framework, options, words, tmp_path):
    weights = dataclasses.replace(weights_of("bert" if options is MODELS["bert"] else "git"), options=options)
    params = {name: value for name, value in weights.params.items() if "pre_norm" not in name}
    weights = dataclasses.replace(weights, params=params)
    with pytest.raises(UserError, match=words):
        formats.write(framework, str(tmp_path / "out"), weights)
    assert not list(tmp_path.iterdir())
