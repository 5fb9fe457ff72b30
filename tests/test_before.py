"""Folders, files and workdirs that earlier code wrote (tests/before) load, convert and go on as they did then."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
from conftest import ROOT, assert_close

import capvl
from capvl import recipes, train
from capvl.convert import __main__ as convert
from capvl.convert import files, formats
from capvl.convert.folder import read_model
from capvl.convert.load import load_parameters

BEFORE = pathlib.Path(ROOT, "tests", "before")
EXPECTED = json.loads((BEFORE / "expected.json").read_text(encoding="utf-8"))
TEXTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A folder with all of them."""
    folder = tmp_path_factory.mktemp("before")
    for name in ("models", "runs"):
        with tarfile.open(BEFORE / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


def digest(arrays):
    """Of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        value = np.asarray(arrays[name])
        found.update(f"{name} {value.dtype} {value.shape}\n".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def framework_of(name):
    return {"runs": "capvl"}.get(name.split("/")[0], name.split("/")[0])


@pytest.mark.parametrize("name", EXPECTED["read"])
def test_they_are_read_as_before(before, name):
    """Options, pixels, tokenizer and arrays; options that are new since then have their defaults."""
    expected = dict(EXPECTED["read"][name])
    weights = formats.read(framework_of(name), str(before / name), heads=2)
    options = expected.pop("options")
    found = json.loads(json.dumps(dataclasses.asdict(weights.options)))
    new = {f.name: f.default for f in dataclasses.fields(weights.options) if f.name not in options}
    assert found == {k: v for k, v in options.items() if k != "class"} | new
    assert type(weights.options).__name__ == options["class"]
    assert digest(weights.params) == expected.pop("arrays")
    assert os.path.basename(weights.tokenizer) == expected.pop("tokenizer")
    assert {key: getattr(weights, key) for key in expected} == expected


@pytest.mark.parametrize("name", EXPECTED["outputs"])
def test_they_give_what_they_gave(before, name):
    model = capvl.load(str(before / name))
    images = list(np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8))
    calls = {
        "embed": lambda: model.embed(images),
        "embed_text": lambda: model.embed_text(TEXTS),
        "score": lambda: model.score(images, TEXTS),
        "caption": lambda: model.caption(images),
    }
    for call, expected in EXPECTED["outputs"][name].items():
        if call == "caption":
            assert calls[call]() == expected
        else:
            assert_close(calls[call](), expected, 1e-5, f"{name} {call}")


def exports():
    """(converted folder, framework, what was written, its flags)."""
    for name in EXPECTED["read"]:
        framework, _, written = name.partition("/")
        model = written.removesuffix(".npz").removesuffix("_scan")
        if framework in formats.TARGETS and framework != "capvl" and f"capvl/{model}" in EXPECTED["read"]:
            yield f"capvl/{model}", framework, name, ["--scan"] if "_scan" in written else []


@pytest.mark.parametrize("model, framework, written, flags", exports())
def test_they_are_written_as_before(before, tmp_path, model, framework, written, flags):
    """Arrays, configurations, processors and tokenizers, byte by byte."""
    there, then = tmp_path / pathlib.Path(written).name, before / written
    convert.main(["--from=capvl", f"--to={framework}", *flags, str(before / model), str(there)])
    if framework == "big_vision":
        assert digest(files.read_npz(str(there))) == digest(files.read_npz(str(then)))
        return
    assert {f.name for f in there.iterdir()} == {f.name for f in then.iterdir()}
    for file in then.iterdir():
        assert (there / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("model", [name for name in EXPECTED["read"] if name.startswith("capvl/")])
def test_folders_are_written_as_before(before, tmp_path, model):
    convert.main(["--from=capvl", "--to=capvl", str(before / model), str(tmp_path / "again")])
    for file in (before / model).iterdir():
        if file.name != "model.json":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    now, then = (json.loads((f / "model.json").read_text()) for f in (tmp_path / "again", before / model))
    options = now.pop("options")
    assert {key: options[key] for key in then["options"]} == then.pop("options") and now == then


def options_of(before, name):
    return read_model(str(before / "capvl" / name)).options


@pytest.mark.parametrize("name", EXPECTED["init"])
def test_models_of_other_kinds_begin_with_them(before, name):
    """A BERT as a GIT's decoder and as a text tower, a tied GIT as one with an output layer of its own."""
    given, _, wanted = name.partition(" for ")
    options = options_of(before, wanted.removeprefix("untied "))
    only = ()
    if wanted.startswith("untied"):
        options = dataclasses.replace(options, tied=False)
    elif wanted == "lit":
        options = dataclasses.replace(options, text_norm="post", text_activation="gelu", text_eps=1e-12, length=6)
    if given == "bert":
        only = ("text/(?!head).*",) if wanted == "lit" else ("decoder/(?!visual).*",)
    assert digest(load_parameters(str(before / "capvl" / given), options, only)) == EXPECTED["init"][name]


@pytest.mark.long
def test_a_run_goes_on(before, tmp_path, monkeypatch, data_dir, one_device):
    """From the checkpoint of step 2 on with the losses that it had then."""
    shutil.copytree(before / "runs" / "cappa", tmp_path / "run")
    (tmp_path / "data").symlink_to(data_dir)
    shutil.copyfile(tmp_path / "run" / "tokenizer.txt", tmp_path / "wordpiece.txt")
    monkeypatch.chdir(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    then = [json.loads(line) for line in metrics.read_text().splitlines()]
    recipe = recipes.resolve(recipes.read_values(tmp_path / "run" / "config.json"))
    # The embedded data set is drawn again; other releases may write its files otherwise.
    train.run(recipe, "run", new_data=True)
    now = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in now] == [1, 2, 3, 4]
    for row, expected in zip(now, then, strict=True):
        for key in ("loss", "grad_norm", "nll_cap", "nll_pa", "lr"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5), key
