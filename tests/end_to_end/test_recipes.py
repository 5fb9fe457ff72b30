"""LiT, probes, fine-tuning and transfer from one captioner's run to their evaluations."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY_MODEL
from launching import free_port

from capvl import config, evaluation, precompute, recipes, train
from capvl.checkpoint import Checkpointer
from capvl.errors import UserError

ENCODER = {k: TINY_MODEL[k] for k in ("encoder", "res", "dtype")}
TOWERS = ENCODER | {"text": "w16d1h2m32", "vocab": 128, "length": 12}
LOCKED = ("encoder/(?!map/).*",)


@pytest.fixture(scope="module")
def captioner(data_dir, tmp_path_factory):
    """The workdir of a trained captioner."""
    from conftest import tiny_values

    workdir = tmp_path_factory.mktemp("runs") / "captioner"
    train.run(recipes.resolve(tiny_values(data_dir) | {"steps": 2}), str(workdir))
    return str(workdir)


def params_of(workdir):
    return Checkpointer(str(workdir)).read_params(None)[0]


def start(tiny, workdir, **changes):
    recipe = recipes.resolve(tiny(steps=2, **changes))
    train.run(recipe, str(workdir))
    return recipe, params_of(workdir)


GIT = ENCODER | {
    "pool": "mean", "pre_norm": False, "class_position": False, "activation": "gelu_tanh", "eps": 1e-6,
    "pixels": "half", "text": "w16d2h2m32", "vocab": 128, "start": 0, "length": 12, "text_positions": 12,
}  # fmt: skip

RECIPES = {
    "lit": dict(
        objective={"name": "contrastive", "locked": True},
        model=TOWERS | {"pool": "map", "dtype": "bfloat16"},
        init_only=LOCKED,
    ),
    "transfer": dict(
        objective={"name": "transfer"},
        model=TINY_MODEL | {"vocab": 131, "decoder_layers": 1},
        init_only=("encoder/.*",),
    ),
    "git": dict(
        objective={"name": "git", "tasks": ["caption", "answer"], "locked": True, "texts": 2},
        model=GIT,
        init_only=("encoder/.*",),
    ),
    "probe": dict(
        objective={"name": "probe"}, model=ENCODER | {"classes": 9, "heads": 2, "probe_pool": "map"}, init_only=LOCKED
    ),
    "finetune": dict(
        objective={"name": "probe", "locked": False}, model=ENCODER | {"classes": 9, "res": 48}, init_only=LOCKED
    ),
}
EVALS = {
    "lit": {"retrieval": {"limit": 16}, "zeroshot": {"name": "scenes/tiny"}},
    "transfer": {"answers": {"limit": 12}, "captions": {"count": 4}},
    "git": {
        "answers": {"limit": 12, "prior": "train"},
        "facts": {"limit": 4},
        "captions": {"count": 4},
        "perplexity": {"limit": 8, "modes": ["cap"]},
    },
    "probe": {"probe": {}},
}


@pytest.mark.parametrize("name", [n if n == "probe" else pytest.param(n, marks=pytest.mark.long) for n in RECIPES])
def test_recipe(name, tiny, captioner, tmp_path):
    """It runs, the encoder begins as the captioner's was, only what should train does, and what is locked is kept in
    the activations' dtype without optimizer state."""
    changes = dict(RECIPES[name], init_from=captioner)
    recipe, params = start(tiny, tmp_path / "run", **changes)
    begin = params_of(captioner)
    dtype = changes["model"]["dtype"]
    if name == "finetune":
        assert (params["encoder/blocks/mlp/up/kernel"] != begin["encoder/blocks/mlp/up/kernel"]).any()
        assert params["encoder/positions"].shape == (9, 16)
    else:
        for key in [k for k in params if k.startswith("encoder/") and "/map/" not in k]:
            assert params[key].dtype == dtype, key
            np.testing.assert_array_equal(params[key], begin[key].astype(dtype), err_msg=key)
        trained = [k for k in params if not k.startswith("encoder/") or "/map/" in k]
        assert trained and all(params[k].dtype == np.float32 for k in trained)
        state = recipe.train_step().state_shapes.opt_state
        paths = [str(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
        assert paths and not any("encoder/blocks" in path for path in paths)
    if name in EVALS:
        found = evaluation.evaluate(str(tmp_path / "run"), [("evals", repr(EVALS[name]))])
        assert all(np.isfinite(v) for v in found.values())
        assert set(EVALS[name]) == {k.split("/")[0] for k in found}


@pytest.mark.long
def test_clips_begin_with_an_image_model(tiny, captioner, tmp_path):
    """A GIT of clips takes the captioner's encoder; its frames' vectors begin at zero and learn; it is evaluated."""
    data = {**tiny()["data"], "name": "scenes/clips_tiny"}
    objective = {"name": "git", "tasks": ["caption", "answer"]}
    changes = dict(init_from=captioner, init_only=("encoder/.*",), model=GIT | {"frames": 2}, data=data, batch_size=8)
    recipe, params = start(tiny, tmp_path / "run", objective=objective, **changes)
    from capvl.convert.load import initial_state
    from capvl.parallel.mesh import make_mesh

    begin = jax.device_get(initial_state(recipe, recipe.train_step(), make_mesh(recipe.mesh)).params)
    assert not begin["frames"].any() and np.abs(params["frames"]).max() > 0
    evals = {"moves": {"type": "answers", "task": "caption", "limit": 4}, "captions": {"count": 2, "shown": 2}}
    found = evaluation.evaluate(str(tmp_path / "run"), [("evals", repr(evals))])
    assert {"moves/exact", "moves/exact/blind", "captions/distinct"} <= set(found)


def test_heads_of_a_probe_do_not_disturb_each_other(tiny, captioner, tmp_path):
    """Two heads with their own rates equal two runs with one head each."""
    optimizer = {"name": "sgd", "lr": 1.0, "clip_norm": 0.0, "weight_decay": 0.0}
    shared = dict(objective={"name": "probe"}, init_from=captioner, init_only=LOCKED)
    rates = (0.5, 0.05)
    both = optimizer | {"lr_mult": [[f"heads/{i}/.*", r] for i, r in enumerate(rates)]}
    model = ENCODER | {"classes": 9}
    _, together = start(tiny, tmp_path / "both", model=model | {"heads": 2}, optimizer=both, **shared)
    for i, rate in enumerate(rates):
        one = optimizer | {"lr_mult": [["heads/0/.*", rate]]}
        _, alone = start(tiny, tmp_path / str(i), model=model, optimizer=one, **shared)
        kernel = alone["heads/0/linear/kernel"]
        assert np.abs(kernel).max() > 0
        np.testing.assert_allclose(together[f"heads/{i}/linear/kernel"], kernel, atol=1e-6)


@pytest.mark.long
def test_cached_embeddings_train_the_same(tiny, captioner, tmp_path, data_dir):
    """Without random crops the cached run has the losses of the run on images, to float16's precision."""
    values = RECIPES["lit"] | {"init_from": captioner, "model": TOWERS | {"pool": "map"}}
    data = {"name": "scenes/tiny", "data_dir": data_dir, "crop": "center"}
    recipe, _ = start(tiny, tmp_path / "images", **(values | {"data": data}))
    name = "embedded"
    precompute.write(dataclasses.replace(recipe, batch_size=64), name, 2, "train")
    with pytest.raises(UserError, match="is there already"):
        precompute.write(recipe, name, 1, "train")
    cached = data | {"name": name, "tokenizer": recipe.data.tokenizer_path()}
    objective = {"name": "contrastive", "locked": True, "cached": True}
    start(tiny, tmp_path / "cached", **(values | {"data": cached, "objective": objective}))
    losses = []
    for run in ("images", "cached"):
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["scale"] for line in lines])
    assert len(losses[0]) == len(losses[1]) == 2
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)


BAD = [
    (dict(objective={"name": "contrastive"}, model=TOWERS, micro_batches=2), "only the negatives of a part"),
    (dict(objective={"name": "contrastive", "cached": True}, model=TOWERS), "needs objective.locked=True"),
    (dict(objective={"name": "contrastive", "caption_weight": 1.0}, model=TOWERS), "go together"),
    (
        dict(objective={"name": "probe", "locked": False}, model=ENCODER | {"heads": 2}),
        "would tune one encoder together",
    ),
    (dict(objective={"name": "transfer"}, model=TINY_MODEL | {"vocab": 50}), "3 ids are for the tasks: model.vocab"),
    (dict(objective={"name": "transfer", "tasks": ["sing"]}), "'sing' is unknown"),
    (dict(objective={"name": "probe"}, model=ENCODER | {"classes": 2}), r"has the label \d, and model.classes=2"),
    (dict(init_from="nowhere"), "init_from: 'nowhere' is neither a run's workdir"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_contradicting_options(changes, message, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        train.run(recipes.resolve(tiny(**changes)), str(tmp_path / "run"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()


def test_a_workdir_where_nothing_was_trained_takes_another_recipe(tiny, tmp_path):
    for length in (12, 9):  # Both fail; the second is not told that the workdir is the first's.
        model = TINY_MODEL | {"length": length}
        with pytest.raises(UserError, match="init_from"):
            train.run(recipes.resolve(tiny(init_from="nowhere", model=model)), str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["length"] == 9


def test_init_from_a_model_without_the_tower(tiny, captioner, tmp_path):
    changes = RECIPES["lit"] | {"init_from": captioner, "init_only": ("text/.*",)}
    with pytest.raises(UserError, match="text.* is only in the model"):
        train.run(recipes.resolve(tiny(**changes)), str(tmp_path / "run"))


def test_a_converted_folder_is_evaluated_like_a_run(tiny, captioner, tmp_path, data_dir, capsys):
    from capvl.convert import __main__ as convert

    convert.main(["--from=capvl", "--to=capvl", captioner, str(tmp_path / "captioner")])
    convert.main(["--from=capvl", "--to=timm", captioner, str(tmp_path / "timm")])
    convert.main(["--from=timm", "--to=capvl", "--heads=2", str(tmp_path / "timm"), str(tmp_path / "encoder")])
    (tmp_path / "evaluate.py").write_text(f"def get_config():\n    return {tiny()!r}\n")
    spec = str(tmp_path / "evaluate.py")
    evals = [("evals", "{'few': {'type': 'fewshot', 'name': 'scenes/tiny', 'shots': [1], 'seeds': [0]}}")]
    of_run = evaluation.evaluate(captioner, evals)
    for folder in ("captioner", "encoder"):
        # timm has no name for our fast way of resizing; its configuration says the nearest, which is then read.
        fast = [("data.interpolation", "fast")] if folder == "encoder" else []
        found = evaluation.evaluate(str(tmp_path / folder), [*evals, *fast], spec=spec)
        assert found == pytest.approx(of_run, abs=1e-6), folder
    with pytest.raises(UserError, match="is a converted model: --config"):
        evaluation.evaluate(str(tmp_path / "encoder"), evals)
    perplexity = [("evals", "{'perplexity': {}}")]
    with pytest.raises(UserError, match="'perplexity' needs a model with a decoder"):
        evaluation.evaluate(str(tmp_path / "encoder"), perplexity, spec=spec)
    assert not (tmp_path / "encoder" / "evaluate").exists()
    (tmp_path / "other.py").write_text(f"def get_config():\n    return {tiny(init_from='nowhere')!r}\n")
    assert evaluation.evaluate(str(tmp_path / "encoder"), evals, spec=str(tmp_path / "other.py"))


def test_a_killed_evaluation_leaves_no_result(captioner, monkeypatch):
    from capvl.evals.fewshot import FewShot

    before = pathlib.Path(captioner, "evaluations.jsonl")
    before = before.read_text() if before.exists() else ""

    def setup(self, context):
        def run(params):
            yield "1shot", 0.5
            raise KeyboardInterrupt

        return run

    monkeypatch.setattr(FewShot, "setup", setup)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(captioner, [("evals", "{'few': {'type': 'fewshot'}}")])
    after = pathlib.Path(captioner, "evaluations.jsonl")
    assert (after.read_text() if after.exists() else "") == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lit", "transfer", "captioner"])
def test_two_hosts_evaluate_as_one(name, tiny, captioner, tmp_path, data_dir):
    """Every evaluator that the model can have gives the same numbers in two processes as in one."""
    if name == "captioner":
        workdir = captioner
    else:
        workdir = str(tmp_path / "run")
        train.run(recipes.resolve(tiny(steps=2, init_from=captioner, **RECIPES[name])), workdir)
    labelled = {"name": "scenes/tiny"}
    evals = {
        "lit": {"retrieval": {"limit": 30}, "zeroshot": labelled, "linear_probe": labelled | {"steps": 5, "l2": [0.1]}},
        "transfer": {"answers": {"limit": 21}, "captions": {"count": 5, "beams": 2}},
        "captioner": {
            "scoring": labelled,
            "perplexity": {},
            "captions": {"count": 5},
            "fewshot": labelled | {"shots": [1], "seeds": [0]},
        },
    }[name]
    command = [sys.executable, "-m", "capvl.evaluate", workdir, f"--config.evals={evals!r}"]
    port = free_port()
    plain = os.environ | {"JAX_PLATFORMS": "cpu"}
    environments = [
        plain
        | {"JAX_NUM_CPU_DEVICES": "4", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
        | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}
        for i in range(2)
    ]
    for group in (environments, [plain | {"JAX_NUM_CPU_DEVICES": "8"}]):
        running = [subprocess.Popen(command, cwd=ROOT, env=env) for env in group]
        assert [process.wait(timeout=500) for process in running] == [0] * len(group)
    lines = pathlib.Path(workdir, "evaluations.jsonl").read_text().splitlines()
    together, alone = (json.loads(line) for line in lines[-2:])
    assert together.keys() == alone.keys()
    for key, value in alone.items():
        if isinstance(value, float):
            assert together[key] == pytest.approx(value, abs=1e-5), key
