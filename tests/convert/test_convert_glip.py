"""GLIP by its official names: nothing is lost there and back, what isn't theirs is refused; what GLIPs begin with."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from conftest import assert_close, under
from golden_glip import load
from handmade import picture
from test_convert import MODELS, assert_same, random_params, run, weights_of

import capvl
from capvl import evaluation, recipes
from capvl.convert import files, folder, formats, glip
from capvl.convert.load import load_parameters
from capvl.data.preparing import region_sets
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.captioner import CaptionerOptions
from capvl.models.encoder import EncoderOptions
from capvl.models.parameters import Blueprint
from capvl.weights import Weights

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "thing", ".", ","]
OPTIONS = MODELS["glip"]
TEXT = "language_backbone.body.model."
HEAD = "rpn.head."


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("".join(f"{piece}\n" for piece in PIECES))
    return str(path)


def made(**changes):
    options = dataclasses.replace(OPTIONS, **changes)
    return Weights(random_params(options), options, "hugging_face", interpolation="bilinear")


def write_theirs(place, arrays, config=None):
    """A folder of arrays by the official names, with or without config.json."""
    place.mkdir()
    files.write_safetensors(place / "model.safetensors", arrays)
    if config is not None:
        (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.golden
def test_official_names_there_and_back(tmp_path, vocabulary):
    """The golden state dict by the command, as a process of several saved it, with buffers and heads that nothing
    reads; the official names have the same arrays again."""
    theirs = under(load("e2e"), "param")
    more = {
        "rpn.anchor_generator.cell_anchors.0": np.zeros((1, 4), np.float32),
        f"{TEXT}pooler.dense.weight": np.zeros((2, 2), np.float32),
        f"{TEXT}embeddings.position_ids": np.arange(4),
        "backbone.body.layers.0.blocks.0.attn.relative_position_index": np.zeros((2, 2), np.int64),
        f"{HEAD}cls_logits.bias": np.zeros(3, np.float32),
    }
    told = dict(text_heads=4, fusion_heads=4, groups=4, res=96, max_side=128)
    saved = {f"module.{name}": value for name, value in (theirs | more).items()}
    write_theirs(tmp_path / "theirs", saved, told)
    run("--from=glip", "--to=capvl", tmp_path / "theirs", tmp_path / "ours", f"--tokenizer={vocabulary}")
    ours = folder.read_model(str(tmp_path / "ours"))
    assert (ours.options.res, ours.options.max_side, ours.options.groups) == (96, 128, 4)
    assert ours.interpolation == "bilinear" and sizes.parse_size(ours.options.text).heads == 4
    run("--from=capvl", "--to=glip", tmp_path / "ours", tmp_path / "back")
    back = files.read_safetensors(str(tmp_path / "back/model.safetensors"))
    left = ("anchor_generator", "relative_position_index", "position_ids", "cls_logits")
    assert_same(back, {name: value for name, value in theirs.items() if not any(part in name for part in left)})


@pytest.mark.parametrize(
    "changes",
    [{}, {"fusion": "separate"}, {"fusion": "to_image"}, {"fusion": "none", "fusion_width": 2048, "fusion_heads": 8}],
)
def test_what_we_wrote_is_the_same_model(changes, tmp_path, vocabulary):
    weights = dataclasses.replace(made(**changes), tokenizer=vocabulary, clean="lower", interpolation="bicubic")
    formats.write("glip", str(tmp_path / "out"), weights)
    again = formats.read("glip", str(tmp_path / "out"))
    assert again.options == weights.options and again.interpolation == "bicubic"
    assert_same(again.params, weights.params)
    ours, theirs = tokenizers.load(vocabulary), tokenizers.load(again.tokenizer)
    np.testing.assert_array_equal(theirs("RED thing.", 12), ours("red thing.", 12))


def test_a_tuned_prompt_goes_along(tmp_path):
    weights = made(prompt_table=True)
    formats.write("glip", str(tmp_path / "out"), weights)
    state = files.read_safetensors(str(tmp_path / "out/model.safetensors"))
    np.testing.assert_array_equal(state["rpn.tunable_linear.weight"], weights.params["prompt"])
    again = formats.read("glip", str(tmp_path / "out"))
    assert again.options == weights.options
    assert_same(again.params, weights.params)


def test_what_the_arrays_do_not_tell(tmp_path):
    """Without config.json it is as in the released models; --heads are the text's; a longer text than there is room
    for is an error."""
    weights = made(text="w128d1h2m8", text_positions=256)
    state = glip.write_official(weights.options, weights.params)
    bare = str(write_theirs(tmp_path / "bare", state))
    found = formats.read("glip", bare)
    released = dict(res=800, max_side=1333, length=256, groups=16, fusion_heads=8, offsets="flat")
    assert found.options == dataclasses.replace(weights.options, **released) and found.interpolation == "bilinear"
    assert formats.read("glip", bare, heads=4).options.text == "w128d1h4m8"
    said = write_theirs(tmp_path / "said", state, dict(text_heads=4, length=257))
    with pytest.raises(UserError, match="model.length=257 should be at least 3 and fit model.text_positions=256"):
        formats.read("glip", str(said))


VIT = dict(
    encoder="w8d1h1m8/8", pad_windows=False, level_norms=False, window=7, activation="gelu_tanh", eps=1e-6,
    pixels="half",
)  # fmt: skip
WRONG = [
    ({"offsets": "clean"}, "reads the offsets of coarser levels by model.offsets='flat'.*made with 'clean'"),
    (VIT, "has a Swin; the official code has no"),
    (dict(classes=("a", "b", "c"), length=3, fusion="none"), r"model.classes=\(\); this model has \('a'"),
    (dict(level_norms=False), "model.level_norms=True; this model has False"),
    (dict(text_eps=1e-5), "model.text_eps=1e-12; this model has 1e-05"),
]


@pytest.mark.parametrize("changes, sentence", WRONG)
def test_models_that_the_official_code_has_not(changes, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        formats.write("glip", str(tmp_path / "out"), made(**changes))
    assert not (tmp_path / "out").exists()


def test_other_models_are_not_written():
    with pytest.raises(UserError, match="no form of this model, which has GitOptions"):
        formats.write("glip", "out", weights_of("git"))


def test_files_that_are_no_glip(tmp_path):
    state = glip.write_official(OPTIONS, made().params)
    told = glip.Told(text_heads=2, fusion_heads=2, groups=4, res=64, max_side=96, length=12)
    for name in ("backbone.body.patch_embed.proj.weight", f"{HEAD}log_scale"):
        with pytest.raises(UserError, match=f"lack '{name}', so they are not those of a GLIP"):
            glip.read_official({k: v for k, v in state.items() if k != name}, told)
    with pytest.raises(UserError, match="1 arrays that a model of GLIP does not have: more"):
        glip.read_official(state | {"more": np.zeros(1)}, told)
    lacking = f"{TEXT}encoder.layer.0.output.dense.bias"
    with pytest.raises(UserError, match=f"lack '{lacking}'"):
        glip.read_official({k: v for k, v in state.items() if k != lacking}, told)
    formats.write("glip", str(tmp_path / "out"), made())
    file = tmp_path / "out/config.json"
    config = json.loads(file.read_text())
    for change, sentence in (
        ({"res": "64"}, "has res='64' in config.json"),
        ({"groups": True}, "has groups=True in config.json"),
        ({"groups": 5}, "model.width=16 a multiple of 4 and of model.groups=5"),
        ({"offsets": "round"}, "model.offsets"),
        ({"interpolation": "cubic"}, "has interpolation='cubic' in config.json; known are fast, bilinear, bicubic"),
        ({"model_type": "bert"}, "config.json beside .* is of a 'bert'"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=sentence):
            formats.read("glip", str(tmp_path / "out"))


@pytest.mark.torch
def test_the_running_mean_of_a_training_checkpoint(tmp_path, capsys):
    """Beside the parameters; read where it is asked for, and asking where there is none is an error."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    weights = made()
    formats.write("glip", str(tmp_path / "out"), weights)
    config = (tmp_path / "out/config.json").read_text()
    place = tmp_path / "run"
    place.mkdir()
    (place / "config.json").write_text(config)
    file = str(place / "model_final.pth")
    formats.write("glip", file, weights)
    contents = torch.load(file, weights_only=True)
    assert all(name.startswith("module.") for name in contents["model"])
    with pytest.raises(UserError, match="--ema reads .* 'model_ema', and '.*model_final.pth' holds none"):
        formats.read("glip", file, allow_pickle=True, ema=True)
    contents |= {"model_ema": {name: value + 1 for name, value in contents["model"].items()}, "iteration": 3}
    torch.save(contents, file)
    with pytest.raises(UserError, match="is a pickle, which can run any code"):
        formats.read("glip", file, ema=True)
    capsys.readouterr()
    assert_same(formats.read("glip", file, allow_pickle=True).params, weights.params)
    assert "also holds a running mean of its parameters" in " ".join(capsys.readouterr().out.split())
    run("--from=glip", "--to=capvl", "--allow_pickle", "--ema", file, tmp_path / "mean")
    assert_same(
        folder.read_model(str(tmp_path / "mean")).params,
        {name: value + 1 for name, value in weights.params.items()},
    )


def test_means_are_in_pickles_only(tmp_path):
    formats.write("glip", str(tmp_path / "out"), made())
    folder.write_folder(str(tmp_path / "ours"), made())
    with pytest.raises(UserError, match="'.*model.safetensors' holds none; leave it out"):
        formats.read("glip", str(tmp_path / "out"), ema=True)
    with pytest.raises(UserError, match="by their running mean anyway"):
        formats.read("capvl", str(tmp_path / "ours"), ema=True)


def test_a_glip_begins_with_a_swin_and_a_bert(tmp_path):
    """By the keys that configs/glip_t.py names: norms of levels that a classifier has not are fresh ones."""
    config = recipes.load("configs/glip_t.py").source
    words = pathlib.Path("configs/glip_t.py").read_text(encoding="utf-8")
    only = ("encoder/.*", "text/.*")
    assert f'--config.init_only="{only}"' in words and not config.get("init_only")
    swin = EncoderOptions(
        OPTIONS.encoder, window=4, res=128, activation="gelu", eps=1e-5, pixels="imagenet", dtype="float32"
    )
    bert = dataclasses.replace(MODELS["bert"], text="w16d1h2m32", vocab=30, length=20)
    for name, options in (("swin", swin), ("bert", bert)):
        folder.write_folder(str(tmp_path / name), Weights(random_params(options), options))
    params = load_parameters(f"{tmp_path / 'swin'} + {tmp_path / 'bert'}", OPTIONS, only)
    wanted = {name for name in Blueprint(OPTIONS).shapes if name.startswith(("encoder/", "text/"))}
    assert params.keys() == wanted
    theirs, texts = random_params(swin), random_params(bert)
    for name, value in params.items():
        if name in theirs:
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)
        elif name.startswith("encoder/"):
            assert name.split("/")[-2] == "norm" and (value == float(name.endswith("scale"))).all()
    np.testing.assert_array_equal(params["text/positions"], texts["positions"][:16])
    np.testing.assert_array_equal(params["text/tokens"], texts["tokens"])
    other = dataclasses.replace(OPTIONS, text_eps=1e-5)
    with pytest.raises(UserError, match="makes texts' encoders of model.text_eps=1e-12"):
        load_parameters(str(tmp_path / "bert"), other, ("text/.*",))


def test_a_glip_on_a_plain_vit_begins_with_a_captioner(tmp_path):
    """Positions of a smaller image are resized; what else the captioner has is left."""
    image = dict(encoder="w8d1h1m8/8", dtype="float32")
    options = CaptionerOptions(**image, res=32, decoder_layers=1, vocab=30, length=8)
    folder.write_folder(str(tmp_path / "captioner"), Weights(random_params(options), options))
    model = dataclasses.replace(OPTIONS, **VIT)
    params = load_parameters(str(tmp_path / "captioner"), model, ("encoder/.*",))
    assert params.keys() == {name for name in Blueprint(model).shapes if name.startswith("encoder/")}
    assert params["encoder/positions"].shape == (64, 8)
    assert_close(params["encoder/norm/scale"], random_params(options)["encoder/norm/scale"], 0)


@pytest.mark.long
def test_a_converted_glip_is_evaluated_and_asked(tmp_path, vocabulary):
    """`capvl.evaluate FOLDER --config=…` on a data set, and `capvl.load(FOLDER)`."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / f"images/{i}.png").write_bytes(picture(size=(70, 50)))
    truth = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 50, "width": 70} for i in range(3)],
        "annotations": [{"id": i, "image_id": i, "category_id": 3, "bbox": [5, 5, 20, 20]} for i in range(3)],
        "categories": [{"id": 3, "name": "red thing"}, {"id": 9, "name": "blue thing"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    out = str(tmp_path / "data")
    region_sets.prepare("things", "coco", {"val": [str(tmp_path / "truth.json")]}, str(tmp_path / "images"), out)
    formats.write("glip", str(tmp_path / "theirs"), made())
    run("--from=glip", "--to=capvl", tmp_path / "theirs", tmp_path / "ours", f"--tokenizer={vocabulary}")
    overrides = [("data.name", "things"), ("data.data_dir", out), ("evals.detection.name", "things")]
    overrides += [("batch_size", "8")]
    found = evaluation.evaluate(str(tmp_path / "ours"), overrides, spec="configs/glip_coco.py")
    assert found["detection/images"] == 3 and 0 <= found["detection/AP"] <= 1
    model = capvl.load(str(tmp_path / "ours"))
    boxes = model.detect((tmp_path / "images/0.png").read_bytes(), ["red thing", "blue thing"], threshold=0.0)
    assert boxes.boxes.shape == (len(boxes), 4) and set(boxes.labels) <= {"red thing", "blue thing"}
