"""Hugging Face's SigLIP, in and out."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import rules, tokens
from capvl.convert.files import Source, Target
from capvl.convert.hugging_face import (
    PLAIN_FORM,
    assemble_folder,
    check_form,
    heads_of,
    image_options,
    layers,
    section,
    text_options,
    text_section,
    text_tower,
    their_activation,
    with_table,
    write_files,
)
from capvl.convert.rules import CONV, ROW3, SCALAR, Rule
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.abilities import Ability, abilities
from capvl.models.two_towers import TwoTowersOptions
from capvl.models.vision import ImageOptions
from capvl.weights import Weights


def _siglip_image(prefix: str, head: bool) -> list[Rule]:
    attention = f"{prefix}head.attention"
    pooling = [
        Rule("encoder/map/probe", (f"{prefix}head.probe",), ROW3),
        *_packed_map(f"{attention}.in_proj_weight", "kernel"),
        *_packed_map(f"{attention}.in_proj_bias", "bias"),
        Rule("encoder/map/attn/out/kernel", (f"{attention}.out_proj.weight",), rules.OUT),
        Rule("encoder/map/attn/out/bias", (f"{attention}.out_proj.bias",)),
        *rules.norm("encoder/map/norm", f"{prefix}head.layernorm"),
        *rules.dense("encoder/map/mlp/up", f"{prefix}head.mlp.fc1"),
        *rules.dense("encoder/map/mlp/down", f"{prefix}head.mlp.fc2"),
    ]
    return [
        Rule("encoder/stem/kernel", (f"{prefix}embeddings.patch_embedding.weight",), CONV),
        Rule("encoder/stem/bias", (f"{prefix}embeddings.patch_embedding.bias",)),
        Rule("encoder/positions", (f"{prefix}embeddings.position_embedding.weight",)),
        *layers("encoder", prefix),
        *rules.norm("encoder/norm", f"{prefix}post_layernorm"),
        *(pooling if head else []),
    ]


def _packed_map(theirs: str, leaf: str) -> list[Rule]:
    """PyTorch's in_proj of (query, key, value), which `_unpack` has cut in two."""
    return [
        Rule(f"encoder/map/attn/q/{leaf}", (f"{theirs}.q",), rules.Q),
        Rule(f"encoder/map/kv/{leaf}", (f"{theirs}.kv",), rules.PACKED_KV),
    ]


def _unpack(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """in_proj of a MAP head as query, and key with value."""
    out = {}
    for name, value in theirs.items():
        if re.search(r"head\.attention\.in_proj_(weight|bias)$", name):
            third = len(value) // 3
            out |= {f"{name}.q": value[:third], f"{name}.kv": value[third:]}
        else:
            out[name] = value
    return out


def _pack(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for name, value in theirs.items():
        if name.endswith(".q"):
            out[name[:-2]] = np.concatenate([value, theirs[name[:-2] + ".kv"]])
        elif not name.endswith(".kv"):
            out[name] = value
    return out


SIGLIP_VISION, SIGLIP_VISION_HEADLESS = _siglip_image("", True), _siglip_image("", False)
SIGLIP = [
    *_siglip_image("vision_model.", True),
    *text_tower("text_model."),
    *rules.dense("text/head", "text_model.head"),
    Rule("log_scale", ("logit_scale",), SCALAR),
    Rule("bias", ("logit_bias",), SCALAR),
]


_BUFFERS = ("position_ids", "classifier.weight", "classifier.bias")
# What transformers leaves out of config.json where it has its default.
_VISION = dict(
    hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, image_size=224, hidden_size=768, intermediate_size=3072,
    num_hidden_layers=12, num_attention_heads=12, patch_size=16,
)  # fmt: skip
_WORDS, _PAD = 32000, 1  # Of the first SigLIP; config.json of the second names neither its padding nor its end.
_TEXT = dict(
    hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vocab_size=_WORDS, hidden_size=768, intermediate_size=3072,
    num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=64,
)  # fmt: skip


def read_siglip(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any], pad: int | None = None):
    """(options, parameters) of a SiglipModel or SiglipVisionModel.

    Args:
      theirs: state dict.
      config: config.json.
      pad: id that the model's tokenizer fills texts up with; None where it has none beside it.

    Raises:
      UserError: it is another model.
    """
    theirs = _unpack({k: v for k, v in theirs.items() if not k.endswith("position_ids")})
    vision = _VISION | dict(config.get("vision_config", config))
    heads = vision["num_attention_heads"]
    if any(k.startswith("text_model.") for k in theirs):
        text = _TEXT | dict(config.get("text_config", {}))
        options = TwoTowersOptions(
            **image_options(vision, pool="map"), **text_options(text, vision), text_pad=_padding(text, pad)
        )
        both = {"vision_config": vision, "text_config": text}
        return options, rules.read(theirs, SIGLIP, heads_of(both), "SigLIP model", _BUFFERS)
    theirs = {k.removeprefix("vision_model."): v for k, v in theirs.items()}
    head = "head.probe" in theirs
    options = ImageOptions(**image_options(vision, pool="map" if head else "mean"))
    table = SIGLIP_VISION if head else SIGLIP_VISION_HEADLESS
    return options, rules.read(theirs, table, lambda _: heads, "SigLIP image tower", _BUFFERS)


def _padding(text: Mapping[str, Any], pad: int | None) -> int:
    """The id that the text tower reads for padding."""
    pad = text.get("pad_token_id") if pad is None else pad
    if pad is None and text["vocab_size"] == _WORDS:
        pad = _PAD
    if pad is None:
        raise UserError(
            "config.json doesn't name text_config.pad_token_id, and there is no tokenizer beside it whose files do; "
            "SigLIP reads its padding."
        )
    return pad


def write_siglip(options: ImageOptions, params: Mapping[str, np.ndarray]):
    """(state dict, config) of a SiglipModel where there is a text tower of its form, else of a SiglipVisionModel.

    Raises:
      UserError: the model is not one of SigLIP's form.
    """
    form = PLAIN_FORM | dict(pre_norm=False, class_position=False, pixels="half")
    what = "SigLIP image tower"
    check_form(options, form, what)
    if options.pool == "cls":
        raise UserError(f"A {what} has no class token.")
    params = with_table(options, params)
    size, patch = sizes.parse(options.encoder)
    vision = section(size, their_activation(options.activation), options.eps)
    vision |= {"image_size": options.res, "patch_size": patch, "num_channels": 3}
    if not any(name.startswith("text/") for name in params):
        head = options.pool == "map"
        state = rules.write(params, SIGLIP_VISION if head else SIGLIP_VISION_HEADLESS, what)
        vision |= {"vision_use_head": head, "model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"]}
        return _pack(state), vision
    form = dict(
        pool="map", text_pool="last", text_causal=False, text_hides_padding=False, text_norm="pre", projection=0
    )
    check_form(options, form | dict(text_norm="pre"), "SigLIP model")
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": vision,
        "text_config": text_section(options)
        | {
            "vocab_size": options.vocab,
            "max_position_embeddings": options.length,
            "projection_size": size.width,
            "pad_token_id": options.text_pad,
            "bos_token_id": None,
            "eos_token_id": 1,
        },
    }
    return _pack(rules.write(params, SIGLIP, "SigLIP model")), config


def fits(options: Any) -> bool:
    """Whether a model has an image tower: of one without a text tower it is written alone."""
    return Ability.IMAGES in abilities(options)


def read(source: Source) -> Weights:
    """A SigLIP, or its image tower, with the pixels of its processor, its tokenizer and the padding that it reads."""
    tokenizer = tokens.find(source.path)
    options, params = read_siglip(source.arrays, source.config, tokens.padding(tokenizer))
    return assemble_folder(source, options, params, "Siglip")


def write(weights: Weights, target: Target) -> None:
    """Writes a folder for SiglipModel or SiglipVisionModel."""
    params = weights.params
    if not isinstance(weights.options, TwoTowersOptions):
        params = {name: value for name, value in params.items() if name.startswith("encoder/")}
    write_files(weights, target, *write_siglip(weights.options, params))
