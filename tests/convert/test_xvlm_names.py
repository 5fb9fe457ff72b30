"""X-VLM's official names: read, they compute what the official code does; written, they are as they were."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from golden_xvlm import FEATURES, close, load
from test_convert import MODELS, weights_of

from capvl.convert import formats, xvlm, xvlm_official
from capvl.errors import UserError
from capvl.models.features import with_summary

PRETRAINED = ("pretrain_clip", "pretrain_swin")


@pytest.fixture(scope="module", params=PRETRAINED)
def case(request):
    return load(request.param)


@pytest.mark.golden
def test_a_pretrained_model_computes_the_same(case):
    owner, ids = case.golden["in.idx_to_group_img"], case.ids("in.text_ids")
    image, seen = case.image(), case.bools("in.image_atts")

    def run(model):
        tokens = model.levels(image).tokens_BND[owner]
        states = model.states(ids)
        positives = model.itm(model.fuse(states, ids, jnp.asarray(case.out("image_embeds")), seen)[:, 0])
        boxes = model.box_of(model.fuse(states, ids, tokens))
        return tokens, states, model.embed_states(states), boxes, positives

    tokens, states, embedded, boxes, positives = case.compute(run)
    close(tokens, case.out("image_embeds_fullatts"), FEATURES)
    close(states, case.out("text_embeds"), FEATURES)
    close(embedded, case.out("text_feat"), FEATURES)
    close(boxes, case.out("output_coord"), FEATURES)
    close(positives, case.out("itm_logits")[: len(ids)], FEATURES)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["vit_clip", "vit_deit", "swin"])
def test_image_encoders_compute_the_same(name):
    case = load(name)

    def run(model):
        return with_summary(model.encoder.levels(case.image())[-1]).tokens_BND

    close(case.compute(run), case.out("full"), FEATURES)


FILES = (
    *("pretrain_clip", "pretrain_swin", "task_bbox", "task_retrieval", "task_gradcam"),
    *("task_nlvr", "task_nlvr_pretrain", "task_vqa", "task_caption"),
)


@pytest.mark.golden
@pytest.mark.parametrize("name", FILES)
def test_round_trips_are_exact(name):
    """All arrays, those that are tied and the constants too, by their names, types, shapes and bits."""
    case = load(name)
    options = dataclasses.replace(case.options, pixels="clip")
    back = xvlm_official.form_of(case.theirs).write(options, case.params)
    theirs = case.theirs | case.buffers
    assert back.keys() == theirs.keys()
    for key, value in theirs.items():
        assert back[key].dtype == value.dtype, key
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    size = case.config.get("image_res")
    assert options.res == size and options.window == case.config.get("window_size", options.window)


@pytest.mark.golden
def test_a_model_of_boxes_computes_the_same():
    case = load("task_bbox")
    ids = case.ids("in.text_ids")
    found = case.compute(lambda m: m.box_of(m.fuse(m.states(ids), ids, m.encode(case.image()))))
    close(found, case.out("coord"), FEATURES)


@pytest.mark.golden
def test_nlvr2_computes_the_same():
    """The first half of the images are the first of each text."""
    case = load("task_nlvr")
    ids = case.ids("in.text_ids")
    image = case.image()
    pairs = jnp.stack([image[: len(ids)], image[len(ids) :]], axis=1)
    found = case.compute(lambda m: m.judge(pairs, ids[:, None])[:, 0])
    close(found, case.out("logits"), FEATURES)


@pytest.mark.golden
def test_questions_and_captions_compute_the_same():
    case = load("task_vqa")
    ids = case.ids("in.q_ids")
    close(
        case.compute(lambda m: m.states(m.encode(case.image()), ids)),
        case.out("question_states"),
        FEATURES,
    )
    captions = load("task_caption")
    ids, image = captions.ids("in.text_ids"), captions.image()

    def logits(model):
        text, tokens = model.text, model.encode(image)
        return text.word_logits(text.fuse(text.states(ids, causal=True), ids, tokens, causal=True))

    close(captions.compute(logits), captions.out("logits"), FEATURES)


def test_files_that_are_no_x_vlm():
    """A sentence for each: other names, parts that lack, ties that aren't, layers of another order."""
    state = xvlm.write_official(MODELS["xvlm"], weights_of("xvlm").params)
    heads = dict(image_heads=2, text_heads=2)
    word = "text_encoder.bert.embeddings.word_embeddings.weight"
    for change, sentence in (
        ({name: None for name in state if name.startswith("text_encoder.")}, "no text_encoder and no text_decoder"),
        ({"vision_encoder.patch_embed.weight": None}, "no image encoder under 'vision_encoder.'"),
        ({"itm_head.1.bias": None}, "lack 'itm_head.1.bias'"),
        ({"more": np.zeros(1)}, "1 arrays that a model of X-VLM does not have: more"),
        (
            {"text_encoder.cls.predictions.decoder.weight": state[word] + 1},
            "decoder.weight' differs from 'text_encoder",
        ),
        (
            {name: None for name in state if ".layer.1.crossattention." in name},
            r"Layers \[\] of 2 under 'text_encoder.bert.encoder.layer.' have cross-attention",
        ),
    ):
        arrays = {name: value for name, value in (state | change).items() if value is not None}
        with pytest.raises(UserError, match=sentence):
            xvlm_official.form_of(arrays).read(arrays, **heads)


@pytest.mark.parametrize(
    "name, changes, sentence",
    [
        ("xvlm", {"pixels": "half"}, "model.pixels='clip'"),
        ("xvlm", {"text_eps": 1e-5}, "model.text_eps=1e-12"),
        ("judge", {"images": 1}, "class heads for 2 images and 2 classes"),
        ("git", {}, "no form of this model, which has GitOptions"),
    ],
)
def test_models_that_the_official_code_has_not(name, changes, sentence, tmp_path):
    weights = weights_of(name)
    weights = dataclasses.replace(weights, options=dataclasses.replace(weights.options, **changes))
    with pytest.raises(UserError, match=sentence):
        formats.write("xvlm", str(tmp_path / "out"), weights)
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
def test_the_file_of_the_official_code(tmp_path):
    """{"model": state}, as torch.save writes it; read only where pickles are allowed, and then as weights only."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    weights = weights_of("xvlm")
    path = str(tmp_path / "model_state_epoch_9.th")
    formats.write("xvlm", path, weights)
    state = torch.load(path, weights_only=True)["model"]
    assert state["vision_encoder.position_ids"].dtype == torch.int64 and state["temp"].shape == ()
    with pytest.raises(UserError, match="is a pickle, which can run any code"):
        formats.read("xvlm", path, heads=2)
    again = formats.read("xvlm", path, heads=2, allow_pickle=True)
    assert again.options == weights.options
    assert (again.crop, again.interpolation, again.resize, again.clean) == ("squash", "bicubic", "hugging_face", "xvlm")
    assert again.params.keys() == weights.params.keys()
    for name, value in weights.params.items():
        np.testing.assert_array_equal(again.params[name], value, err_msg=name)


HOW = dict(crop="center_floor", crop_fraction=0.9, interpolation="fast", clean="lower")


@pytest.mark.parametrize("reads_end", [True, False])
def test_there_and_back_nothing_is_read_otherwise(reads_end, tmp_path, capsys):
    """How images and texts are read is not in the arrays; the tokenizer comes back, too."""
    vocabulary = tmp_path / "tokenizer.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]))
    weights = weights_of("xvlm")
    options = dataclasses.replace(weights.options, reads_end=reads_end)
    weights = dataclasses.replace(weights, options=options, tokenizer=str(vocabulary), **HOW)
    formats.write("xvlm", str(tmp_path / "out"), weights)
    told = " ".join(capsys.readouterr().out.split())
    assert "without this model's crop='center_floor', interpolation='fast', clean='lower'" in told
    back = formats.read("xvlm", str(tmp_path / "out"))
    assert back.options == options and back.tokenizer == str(tmp_path / "out" / "vocab.txt")
    assert {name: getattr(back, name) for name in HOW} == HOW
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"crop": "centre"}))
    with pytest.raises(UserError, match="has crop='centre' in config.json. Did you mean 'center'"):
        formats.read("xvlm", str(tmp_path / "out"))


def test_files_of_the_official_code_are_read_as_it_reads(tmp_path):
    weights = weights_of("xvlm")
    formats.write("xvlm", str(tmp_path / "out"), weights)
    config = {"image_heads": 2, "text_heads": 2}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    back = formats.read("xvlm", str(tmp_path / "out"))
    assert (back.crop, back.interpolation, back.clean) == ("squash", "bicubic", "xvlm")
    assert back.options.reads_end == ("mlm" not in back.options.heads)
