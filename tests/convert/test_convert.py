"""The convert command: round trips of every format, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from capvl.convert import __main__ as convert
from capvl.convert import (
    files,
    folder,
    formats,
    git,
    git_official,
    hugging_face,
    open_clip,
    rules,
    siglip,
    vit,
)
from capvl.errors import UserError
from capvl.models.bert import BertOptions
from capvl.models.captioner import CaptionerOptions
from capvl.models.encoder import EncoderOptions
from capvl.models.git import GitOptions
from capvl.models.glip import GlipOptions
from capvl.models.parameters import Blueprint
from capvl.models.two_towers import TwoTowersOptions
from capvl.models.xvlm import XVlmOptions
from capvl.models.xvlm_answers import XVlmAnswersOptions
from capvl.models.xvlm_captioner import XVlmCaptionerOptions
from capvl.models.xvlm_judge import JudgeOptions
from capvl.weights import Weights

IMAGE = dict(encoder="w16d2h2m32/8", res=24, dtype="float32")
MODELS = {
    "captioner": CaptionerOptions(**IMAGE, decoder_layers=2, vocab=30, length=8),
    "encoder": EncoderOptions(**IMAGE, pool="mean"),
    "map encoder": EncoderOptions(**IMAGE, pool="map"),
    "class token": EncoderOptions(**IMAGE, pool="cls", class_position=True, activation="gelu"),
    "sincos": EncoderOptions(**IMAGE, pool="mean", positions="sincos"),
    "lit": TwoTowersOptions(**IMAGE, pool="map", text="w12d1h2m24", vocab=30, length=8, text_pad=2),
    "clip": TwoTowersOptions(
        **IMAGE, pool="cls", pre_norm=True, class_position=True, pixels="clip", activation="quick_gelu", eps=1e-5,
        text="w12d1h2m24", vocab=30, length=8, text_pool="argmax", text_causal=True, projection=20,
    ),
    "bert": BertOptions(text="w16d2h2m32", vocab=30, length=8),
    "git": GitOptions(
        **IMAGE, text="w16d2h2m32", vocab=30, start=1, length=8, text_positions=8, frames=2, embedding_eps=1e-12,
    ),
}  # fmt: skip
CLIP_IMAGE = IMAGE | dict(
    pool="cls", pre_norm=True, class_position=True, pixels="clip", activation="quick_gelu", eps=1e-5
)
FUSION = dict(text="w16d2h2m32", cross_layers=1, vocab=30, length=8, text_positions=8)
MODELS |= {
    "xvlm": XVlmOptions(**CLIP_IMAGE, **FUSION, projection=20, local_layers=1, reads_end=False),
    "xvlm captioner": XVlmCaptionerOptions(**CLIP_IMAGE, **FUSION, start=28),
    "xvlm answers": XVlmAnswersOptions(**CLIP_IMAGE, **FUSION, question_length=8, answer_layers=2, start=28, end=29),
    "judge": JudgeOptions(**CLIP_IMAGE, **FUSION, images=2, classes=("False", "True")),
}
MODELS["glip"] = GlipOptions(
    encoder="swin-w8d1-1-1-1h1-2-2-2/4", window=4, res=64, max_side=96, width=16, blocks=1, groups=4, fusion_width=16,
    fusion_heads=2, text="w16d1h2m32", vocab=30, length=12, text_positions=16, dtype="float32",
)  # fmt: skip
MODELS["untied git"] = dataclasses.replace(MODELS["git"], tied=False)


def random_params(options, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s.shape).astype(np.float32) for n, s in Blueprint(options).shapes.items()}


def weights_of(name):
    options = MODELS[name]
    params = random_params(options)
    if name in ("clip", "git", "untied git") or name.startswith(("xvlm", "judge")):  # CLIP has no place for these.
        params |= {"encoder/stem/bias": np.zeros(16, np.float32)}
    if name == "clip":
        params |= {"bias": np.zeros(1, np.float32)}
    return Weights(params, options)


def run(*arguments):
    convert.main([str(a) for a in arguments])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


WAYS = [
    ("captioner", "big_vision"),
    ("lit", "big_vision"),
    ("map encoder", "big_vision"),
    ("encoder", "huggingface"),
    ("map encoder", "huggingface"),
    ("lit", "huggingface"),
    ("clip", "huggingface"),
    ("bert", "huggingface"),
    ("git", "huggingface"),
    ("untied git", "huggingface"),
    ("encoder", "timm"),
    ("map encoder", "timm"),
    ("class token", "timm"),
    ("xvlm", "xvlm"),
    ("xvlm captioner", "xvlm"),
    ("xvlm answers", "xvlm"),
    ("judge", "xvlm"),
    ("glip", "glip"),
]


@pytest.mark.parametrize("name, framework", WAYS)
def test_there_and_back_bit_for_bit(name, framework, tmp_path):
    weights = weights_of(name)
    folder.write_folder(str(tmp_path / "ours"), weights)
    assert_same(folder.read_model(str(tmp_path / "ours")).params, weights.params)
    there = tmp_path / ("there.npz" if framework == "big_vision" else "there")
    run("--from=capvl", f"--to={framework}", tmp_path / "ours", there)
    heads = ["--heads=2"] if framework == "timm" else []
    run(f"--from={framework}", "--to=capvl", *heads, there, tmp_path / "again")
    again = folder.read_model(str(tmp_path / "again"))
    assert_same(again.params, weights.params)
    assert again.options.encoder == weights.options.encoder if name != "bert" else again.options == weights.options
    if framework in ("xvlm", "glip") or (framework == "huggingface" and name in ("clip", "lit", "git", "untied git")):
        assert again.options == weights.options


def test_sincos_positions_are_written_out(tmp_path):
    state, _ = siglip.write_siglip(MODELS["sincos"], weights_of("sincos").params)
    learned, params = siglip.read_siglip(state, siglip.write_siglip(MODELS["sincos"], weights_of("sincos").params)[1])
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 24, 24, 3)), jnp.float32)
    outputs = [
        jax.jit(lambda p, o=options: Blueprint(o).bind(p).features(image))(p)
        for options, p in ((MODELS["sincos"], weights_of("sincos").params), (EncoderOptions(**vars(learned)), params))
    ]
    assert_close(outputs[1], outputs[0], 1e-5)


def test_official_git_has_other_names(tmp_path):
    """The same weights under the official names, in one file, give the same parameters and the released options."""
    weights = weights_of("git")
    params = dict(weights.params)
    frames, _ = params.pop("frames"), params.pop("encoder/stem/bias")
    theirs = rules.write(params, [*git_official.OFFICIAL, rules.Rule("decoder/bias", ("textual.output.bias",))], "GIT")
    theirs["textual.output.weight"] = theirs["textual.embedding.words.weight"]
    theirs["image_encoder.proj"] = np.zeros((16, 4), np.float32)
    theirs |= {f"img_temperal_embedding.{i}": frame[None, None] for i, frame in enumerate(frames)}
    files.write_safetensors(tmp_path / "model.safetensors", theirs)
    again = formats.read("git", str(tmp_path), heads=2)
    assert_same(again.params, weights.params)
    assert again.interpolation == "bicubic" and again.options.embedding_eps == 1e-8
    assert (again.options.frames, again.options.res, again.options.vocab) == (2, 24, 30)
    alone = {k: v for k, v in theirs.items() if k != "textual.output.weight"}
    assert_same(git_official.read_official(alone, 2)[1], weights.params)
    theirs["textual.output.weight"] = theirs["textual.output.weight"] + 1
    options, params = git_official.read_official(theirs, 2)
    assert not options.tied and "decoder/bias" not in params
    np.testing.assert_array_equal(params["decoder/logits/kernel"].T, theirs["textual.output.weight"])
    np.testing.assert_array_equal(params["decoder/logits/bias"], weights.params["decoder/bias"])
    with pytest.raises(UserError, match="not GIT's official ones"):
        git_official.read_official({"a": np.zeros(1)})


@pytest.mark.parametrize(
    "says, file, tied",
    [
        (True, "equal", True),
        (True, "none", True),
        (None, "equal", True),
        (None, "none", True),
        (None, "other", False),
        (False, "equal", True),  # As in the released models, whose configurations say what transformers' own says.
        (False, "other", False),
        (False, "none", "tie_word_embeddings=false, and the weights lack 'output.weight'"),
        (True, "other", "tie_word_embeddings=true, and 'output.weight' differs from 'git.embeddings.word_embeddings"),
    ],
)
def test_whether_a_git_is_tied_is_what_file_and_configuration_say(says, file, tied):
    weights = weights_of("git")
    state, config = git.write_hugging_face(weights.options, weights.params)
    assert config.pop("tie_word_embeddings") is True
    config |= {} if says is None else {"tie_word_embeddings": says}
    if file == "none":
        del state["output.weight"]
    elif file == "other":
        state["output.weight"] = state["output.weight"] + 1
    if isinstance(tied, str):
        with pytest.raises(UserError, match=tied):
            git.read_hugging_face(state, config)
        return
    options, params = git.read_hugging_face(state, config)
    assert options == dataclasses.replace(weights.options, tied=tied)
    assert params.keys() == Blueprint(options).shapes.keys()
    if tied:
        assert_same(params, weights.params)
    else:
        np.testing.assert_array_equal(params["decoder/logits/kernel"].T, state["output.weight"])
        np.testing.assert_array_equal(params["decoder/logits/bias"], weights.params["decoder/bias"])


def test_open_clip_is_openai_clip_by_other_names():
    """The same weights under open_clip's names give the same parameters."""
    options, params = MODELS["clip"], weights_of("clip").params
    state, config = hugging_face.write_clip(options, params)
    theirs = {
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
    }
    norms = [("visual.ln_pre", "vision_model.pre_layrnorm"), ("visual.ln_post", "vision_model.post_layernorm")]
    norms.append(("ln_final", "text_model.final_layer_norm"))
    for tower, prefix in (("vision", "visual."), ("text", "")):
        for i in range(config[f"{tower}_config"]["num_hidden_layers"]):
            there, here = f"{prefix}transformer.resblocks.{i}", f"{tower}_model.encoder.layers.{i}"
            for leaf in ("weight", "bias"):
                packed = [state[f"{here}.self_attn.{p}_proj.{leaf}"] for p in "qkv"]
                theirs[f"{there}.attn.in_proj_{leaf}"] = np.concatenate(packed)
            norms += [(f"{there}.ln_{n}", f"{here}.layer_norm{n}") for n in (1, 2)]
            norms += [(f"{there}.attn.out_proj", f"{here}.self_attn.out_proj")]
            norms += [(f"{there}.mlp.c_fc", f"{here}.mlp.fc1"), (f"{there}.mlp.c_proj", f"{here}.mlp.fc2")]
    for name, ours in norms:
        theirs |= {f"{name}.{leaf}": state[f"{ours}.{leaf}"] for leaf in ("weight", "bias")}
    config = {"model_cfg": {"quick_gelu": True, "vision_cfg": {}, "text_cfg": {}}}
    found, again = open_clip.read_open_clip(theirs, config, heads=2)
    assert dataclasses.replace(found, pixels="clip") == options  # Pixels are read with the files.
    assert_same(again, params)


def test_old_names_of_vit():
    """ViT checkpoints before transformers 5 have other names for the same arrays."""
    options = MODELS["class token"]
    params = random_params(options)
    new = vit.rules.write(params, vit.VIT, "ViT")
    old = {}
    for name, value in new.items():
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            for part, word in (("q", "query"), ("k", "key"), ("v", "value")):
                rest = rest.replace(f"attention.{part}_proj", f"attention.attention.{word}")
            rest = rest.replace("attention.o_proj", "attention.output.dense")
            rest = rest.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
            name = f"encoder.layer.{i}.{rest}"
        old[f"vit.{name}"] = value
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config |= {"patch_size": 8, "image_size": 24, "model_type": "vit"}
    for theirs in (old, new):
        assert_same(vit.read_vit(theirs, config)[1], params)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="is a pickle"):
        files.read_weights(str(tmp_path / "model.bin"))
    with pytest.raises(UserError, match="is a pickle"):
        files.read_weights(str(tmp_path))


def test_bad_input(tmp_path):
    folder.write_folder(str(tmp_path / "ours"), weights_of("captioner"))
    with pytest.raises(UserError, match="is there already"):
        folder.write_folder(str(tmp_path / "ours"), weights_of("captioner"))
    with pytest.raises(UserError, match="do not exist"):
        run("--from=timm", "--to=capvl", tmp_path / "none", tmp_path / "x")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="can't be read as safetensors"):
        run("--from=timm", "--to=capvl", tmp_path / "bad.safetensors", tmp_path / "x")
    files.write_safetensors(tmp_path / "few.safetensors", {"a": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="names the architecture, is not beside"):
        run("--from=timm", "--to=capvl", tmp_path / "few.safetensors", tmp_path / "x")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"}))
    with pytest.raises(UserError, match="not of a timm ViT"):
        run("--from=timm", "--to=capvl", tmp_path / "few.safetensors", tmp_path / "x")
    with pytest.raises(UserError, match="needs a config.json"):
        run("--from=huggingface", "--to=capvl", tmp_path / "few.safetensors", tmp_path / "x")
    with pytest.raises(UserError, match="pool='map'; this model has 'mean'"):
        siglip.write_siglip(TwoTowersOptions(**IMAGE, text="w12d1h2m24"), random_params(MODELS["lit"]))
    with pytest.raises(UserError, match="has no place for a bias of its patch convolution"):
        hugging_face.write_clip(MODELS["clip"], random_params(MODELS["clip"]))
    with pytest.raises(UserError, match="image models only"):
        formats.write("timm", str(tmp_path / "y"), weights_of("bert"))
    description = json.loads((tmp_path / "ours" / "model.json").read_text())
    description["options"]["decoder_layers"] = 3
    (tmp_path / "ours" / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="is of another model"):
        folder.read_model(str(tmp_path / "ours"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "changes", [{"resize": "x"}, {"crop": [1]}, {"interpolation": 3}, {"tokenizer": 3}, {"kind": []}]
)
def test_odd_descriptions(tmp_path, changes):
    folder.write_folder(str(tmp_path / "ours"), weights_of("captioner"))
    file = tmp_path / "ours" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match="is not the description of a model"):
        folder.read_model(str(tmp_path / "ours"))


@pytest.mark.parametrize("kind", ["clip", "lit"])
def test_towers_of_other_kinds_keep_their_own_activation_and_eps(kind):
    """Text and image towers are read apart, written apart, and pooled where the configuration says."""
    options = dataclasses.replace(MODELS[kind], text_activation="gelu", text_eps=1e-3)
    if kind == "clip":
        options = dataclasses.replace(options, text_pool="eos", text_end=7)
    write, read = (
        (hugging_face.write_clip, hugging_face.read_clip)
        if kind == "clip"
        else (siglip.write_siglip, siglip.read_siglip)
    )
    state, config = write(options, weights_of(kind).params)
    assert config["text_config"]["layer_norm_eps"] == 1e-3 != config["vision_config"]["layer_norm_eps"]
    assert config["text_config"]["hidden_act"] == "gelu" != config["vision_config"]["hidden_act"]
    assert read(state, config)[0] == options
    if kind == "clip":
        config["text_config"]["eos_token_id"] = 99
        with pytest.raises(UserError, match="eos_token_id=99"):
            read(state, config)


def test_vit_without_biases_of_queries_keys_and_values():
    options = MODELS["class token"]
    params = random_params(options)
    params["encoder/blocks/attn/qkv/bias"][:] = 0
    state = vit.rules.write(params, vit.VIT, "ViT")
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config |= {"patch_size": 8, "image_size": 24, "model_type": "vit", "qkv_bias": False}
    fewer = {k: v for k, v in state.items() if not k.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))}
    assert_same(vit.read_vit(fewer, config)[1], params)
