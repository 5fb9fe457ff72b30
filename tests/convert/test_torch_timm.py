"""timm's and open_clip's models give the same numbers, by their own configurations; what ours has not is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from pytorch import open_clip, timm

import capvl
from capvl.convert import __main__ as convert
from capvl.convert import formats
from capvl.convert.files import write_safetensors
from capvl.convert.timm import architecture
from capvl.errors import UserError
from capvl.models.parameters import Blueprint

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
TOLERANCE = 2e-5


def randomised(model):
    """Every array of a model random, norms near 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim:
                value.normal_(std=0.2)
                value += 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return model.eval()


def arrays(model):
    """Its state dict, for writing."""
    return {k: v.contiguous().numpy() for k, v in model.state_dict().items()}


def saved(timm, folder, name, arguments, **config):
    """A random timm ViT, as timm saves it."""
    arguments = SMALL | arguments
    model = randomised(timm.create_model(name, **arguments))
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    description = {"architecture": name, "global_pool": model.global_pool, "model_args": arguments} | config
    write_safetensors(folder / "model.safetensors", arrays(model))
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": pretrained} | description))
    return model


MODELS = [
    ("vit_base_patch16_224", {}),
    ("vit_base_patch16_224", {"qkv_bias": False}),
    ("vit_base_patch16_clip_224", {}),
    ("vit_base_patch16_clip_quickgelu_224", {}),
    ("vit_base_patch16_siglip_224", {}),
    ("vit_so400m_patch16_siglip_256", {"mlp_ratio": 3.0}),
    ("vit_base_patch16_siglip_gap_224", {}),
    ("vit_base_patch14_dinov2", {}),
    ("vit_base_patch14_reg4_dinov2", {}),
    ("vit_base_patch32_224", {"act_layer": "quick_gelu"}),
    ("deit_tiny_patch16_224", {}),
    ("deit3_small_patch16_224", {}),
    ("flexivit_small", {}),
]


@pytest.mark.parametrize("name, arguments", MODELS)
def test_timm_gives_the_same_features(name, arguments, timm, tmp_path):
    model = saved(timm, tmp_path, name, arguments)
    convert.main(["--from=timm", "--to=capvl", str(tmp_path), str(tmp_path / "ours")])
    ours = capvl.load(str(tmp_path / "ours"))
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    bound = ours.blueprint.bind(ours.params)
    features = jax.jit(bound.features)(jnp.asarray(image / 127.5 - 1, jnp.float32))
    pixels = torch.tensor((image / 127.5 - 1).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        assert_close(features, model(pixels), TOLERANCE)
    # And out again, for timm.
    if not ours.options.pre_norm:
        convert.main(["--from=capvl", "--to=timm", str(tmp_path / "ours"), str(tmp_path / "out")])
        again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        with torch.no_grad():
            assert_close(again(pixels), features, TOLERANCE)


def test_what_arrays_do_not_tell_is_right_for_every_architecture(timm):
    """Heads, activation and eps of every model of timm whose name is taken; and it is a ViT with blocks like ours."""
    kinds = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
    with torch.device("meta"):
        plain = timm.create_model("vit_tiny_patch16_224", init_values=1.0).blocks[0].state_dict()
    seen = 0
    for name in timm.list_models(["vit*", "deit*", "flexivit*", "eva*", "beit*"]):
        try:
            architecture(name, 768)
        except UserError:
            continue
        with torch.device("meta"):
            model = timm.create_model(name)
        block = model.blocks[0]
        if set(block.state_dict()) - set(plain) or block.mlp.fc1.out_features != block.mlp.fc2.in_features:
            continue  # Refused by their arrays.
        seen += 1
        assert type(model).__name__ == "VisionTransformer" and type(block).__name__ == "Block", name
        assert type(block.attn).__name__ == "Attention" and type(block.norm1).__name__ == "LayerNorm", name
        found = architecture(name, model.embed_dim)
        activation = kinds[type(block.mlp.act).__name__]
        assert found == {"heads": block.attn.num_heads, "activation": activation, "eps": block.norm1.eps}, name
    assert seen > 100


REFUSED = [
    ({"architecture": "resnet50"}, "'resnet50' is not known"),
    ({"architecture": None}, "names the architecture"),
    ({"global_pool": "avg", "model_args": {}}, "global_pool='avg'"),
    ({"model_args": {"qk_norm": True}}, "qk_norm=True"),
    ({"model_args": {"final_norm": False}}, "final_norm=False"),
    ({"model_args": {"act_layer": "silu"}}, "act_layer='silu'"),
    ({"pretrained_cfg": {"input_size": [3, 64, 64]}}, "input_size=\\[3, 64, 64\\]"),
]


@pytest.mark.parametrize("changes, sentence", REFUSED)
def test_timm_that_is_refused(changes, sentence, timm, tmp_path):
    saved(timm, tmp_path, "vit_base_patch16_224", {}, **changes)
    with pytest.raises(UserError, match=sentence):
        formats.read("timm", str(tmp_path))


def test_a_norm_behind_the_pooling_is_refused(timm, tmp_path):
    saved(timm, tmp_path, "vit_base_patch16_224", {"global_pool": "avg"})
    with pytest.raises(UserError, match="fc_norm"):
        formats.read("timm", str(tmp_path))


VISION = dict(image_size=32, layers=2, width=48, head_width=16, patch_size=8)
TEXT = dict(context_length=12, vocab_size=60, width=32, heads=2, layers=2)


def towers(open_clip, folder, model_cfg):
    """A random open_clip model, as open_clip saves it."""
    cfg = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT} | model_cfg
    arguments = {k: v for k, v in cfg.items() if k != "custom_text"}
    cls = open_clip.CustomTextCLIP if cfg.get("custom_text") else open_clip.CLIP
    model = randomised(cls(**arguments))
    write_safetensors(folder / "open_clip_model.safetensors", arrays(model))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    return model


CONFIGURATIONS = [
    {},
    {"quick_gelu": True},
    {"custom_text": True},
    {"vision_cfg": VISION | {"no_ln_pre": True, "act_kwargs": {"approximate": "tanh"}}},
    {"vision_cfg": VISION | {"final_ln_after_pool": True, "norm_kwargs": {"eps": 1e-3}}},
    {"text_cfg": TEXT | {"norm_kwargs": {"eps": 1e-2}, "act_kwargs": {"approximate": "tanh"}}},
    {"text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "first"}},
    {"text_cfg": TEXT | {"pool_type": "eos", "eos_id": 7}},
    {"text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "argmax", "proj_bias": True}, "custom_text": True},
    {"init_logit_bias": -10.0, "text_cfg": TEXT | {"no_causal_mask": True}},
]


@pytest.mark.parametrize("model_cfg", CONFIGURATIONS)
def test_open_clip_gives_the_same_embeddings(model_cfg, open_clip, tmp_path):
    model = towers(open_clip, tmp_path, model_cfg)
    weights = formats.read("open_clip", str(tmp_path))
    check_towers(model, weights)


def check_towers(model, weights):
    """Embeddings and logits of random images and texts."""
    ours = Blueprint(weights.options).bind(jax.device_put(weights.params))
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    text = rng.integers(8, 50, (3, 12)).astype(np.int32)
    text[:, 8:] = 0
    text[:, 7], text[0, 5] = 59, 7
    pixels = np.asarray(jax.jit(ours.encoder.normalize)(jnp.asarray(image))).transpose(0, 3, 1, 2)
    ids = np.where(np.arange(12) < 8, text, weights.options.text_pad)
    with torch.no_grad():
        images = model.encode_image(torch.tensor(pixels), normalize=True)
        texts = model.encode_text(torch.tensor(ids, dtype=torch.long), normalize=True)
        logits = model.logit_scale.exp() * images @ texts.T
        logits = logits if model.logit_bias is None else logits + model.logit_bias
    assert_close(jax.jit(ours.embed_image)(jnp.asarray(image)), images, TOLERANCE)
    assert_close(jax.jit(ours.embed_text)(jnp.asarray(text)), texts, TOLERANCE)
    found = jax.jit(lambda i, t: ours.scale() * ours.embed_image(i) @ ours.embed_text(t).T + ours.offset())
    assert_close(found(jnp.asarray(image), jnp.asarray(text)), logits, 1e-4)


@pytest.mark.parametrize("name, pad", [("timm/ViT-B-16-SigLIP", 1), ("timm/ViT-B-16-SigLIP2", 0)])
def test_open_clip_with_timms_trunk(name, pad, timm, open_clip, tmp_path):
    """SigLIP: a trunk of timm, a text tower that sees its padding, whose id the tokenizer's name tells."""
    text = TEXT | dict(
        hf_tokenizer_name=name, tokenizer_kwargs={"clean": "canonicalize"}, no_causal_mask=True, proj_bias=True,
        pool_type="last", norm_kwargs={"eps": 1e-6}, act_kwargs={"approximate": "tanh"},
    )  # fmt: skip
    vision = dict(image_size=32, timm_model_name="vit_base_patch16_siglip_224", timm_pool="map", timm_proj="none")
    trunk = timm.create_model(vision["timm_model_name"], **(SMALL | dict(embed_dim=128, num_heads=2)))

    class Visual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = trunk

        def forward(self, x):
            return self.trunk(x)

    cfg = {"embed_dim": 128, "vision_cfg": VISION, "text_cfg": text, "init_logit_bias": -10.0}
    model = open_clip.CustomTextCLIP(**cfg)
    model.visual = Visual()
    randomised(model)
    write_safetensors(tmp_path / "open_clip_model.safetensors", arrays(model))
    cfg |= {"vision_cfg": vision, "custom_text": True}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": half}))
    weights = formats.read("open_clip", str(tmp_path))
    assert (weights.options.text_pad, weights.crop, weights.options.pixels) == (pad, "squash", "half")
    assert weights.options.activation == "gelu" and weights.options.text_activation == "gelu_tanh"
    check_towers(model, weights)


OTHERS = [
    ({"vision_cfg": VISION | {"pool_type": "avg"}}, "pool_type='avg'"),
    ({"vision_cfg": VISION | {"attentional_pool": True}}, "attentional_pool=True"),
    ({"vision_cfg": VISION | {"ls_init_value": 0.1}}, "ls_init_value=0.1"),
    ({"vision_cfg": VISION | {"norm_kwargs": {"elementwise_affine": True}}}, "norm_kwargs"),
    ({"text_cfg": TEXT | {"pool_type": "none"}}, "pool_type='none'"),
    ({"text_cfg": TEXT | {"embed_cls": True}}, "embed_cls=True"),
    ({"text_cfg": TEXT | {"hf_model_name": "roberta-base"}}, "hf_model_name='roberta-base'"),
    ({"text_cfg": TEXT | {"proj_type": "none"}}, "proj_type='none'"),
    ({"text_cfg": TEXT | {"pool_type": "last"}}, "no tokenizer beside says which id"),
    ({"text_cfg": TEXT | {"norm_kwargs": {"eps": 0.0}}}, "eps=0 beside 1e-05"),
    ({"text_cfg": TEXT | {"tokenizer_kwargs": {"strip_sep_token": True}}}, "strip_sep_token"),
    ({"multimodal_cfg": {"width": 8}}, "multimodal_cfg"),
]


@pytest.mark.parametrize("changes, sentence", OTHERS)
def test_open_clip_that_is_refused(changes, sentence, open_clip, tmp_path):
    towers(open_clip, tmp_path, {})
    file = tmp_path / "open_clip_config.json"
    values = json.loads(file.read_text())
    values["model_cfg"] |= changes
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=sentence):
        formats.read("open_clip", str(tmp_path))


def test_open_clip_without_its_configuration_is_refused(open_clip, tmp_path):
    towers(open_clip, tmp_path, {})
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match="open_clip_config.json"):
        formats.read("open_clip", str(tmp_path))


def test_evaluation_crops_as_the_model_wants(timm, tmp_path, data_dir):
    """A converted model's crop and interpolation are those of the recipe that evaluates it."""
    from capvl import evaluation

    saved(timm, tmp_path, "vit_base_patch16_224", {})
    weights = formats.read("timm", str(tmp_path))
    formats.write("capvl", str(tmp_path / "ours"), dataclasses.replace(weights, crop="squash"))
    config = "configs/evaluate_encoder.py"
    data = evaluation._converted_recipe(str(tmp_path / "ours"), config, [("data.data_dir", data_dir)]).data
    assert (data.crop, data.interpolation, data.crop_fraction) == ("squash", "bicubic", 32 / 35)
