"""Hugging Face's CLIP, in and out, and what its towers and files share with SigLIP, ViT, GIT and BERT."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import files, pixels, rules, tokens
from capvl.convert.assembling import assemble
from capvl.convert.files import Source, Target
from capvl.convert.rules import CONV, ROW, Rule
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.abilities import Ability, abilities
from capvl.models.two_towers import TwoTowersOptions
from capvl.models.vision import ImageOptions
from capvl.nn.positions import sincos_2d
from capvl.weights import Weights

_CLIP_END = 49407
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


# An encoder without what only ours have; and CLIP's.
PLAIN_FORM = dict(stem="patch", layer_scale=0.0, registers=0)
CLIP_FORM = PLAIN_FORM | dict(pool="cls", pre_norm=True, class_position=True, positions="learned")


def layers(ours: str, theirs: str) -> list[Rule]:
    """The blocks of CLIP and SigLIP, of either tower."""
    block, layer = f"{ours}/blocks/{{i}}", f"{theirs}encoder.layers.{{i}}"
    attention = [f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    return [
        *rules.norm(f"{block}/norm1", f"{layer}.layer_norm1"),
        *rules.attention(f"{block}/attn", *attention),
        *rules.norm(f"{block}/norm2", f"{layer}.layer_norm2"),
        *rules.dense(f"{block}/mlp/up", f"{layer}.mlp.fc1"),
        *rules.dense(f"{block}/mlp/down", f"{layer}.mlp.fc2"),
    ]


def text_tower(prefix: str) -> list[Rule]:
    """The text tower of CLIP and SigLIP, whose names begin with a prefix."""
    return [
        Rule("text/tokens", (f"{prefix}embeddings.token_embedding.weight",)),
        Rule("text/positions", (f"{prefix}embeddings.position_embedding.weight",)),
        *layers("text", prefix),
        *rules.norm("text/norm", f"{prefix}final_layer_norm"),
    ]


def clip_image(prefix: str) -> list[Rule]:
    """CLIP's image tower, whose names begin with a prefix."""
    return [
        Rule("encoder/stem/kernel", (f"{prefix}embeddings.patch_embedding.weight",), CONV),
        Rule("encoder/cls", (f"{prefix}embeddings.class_embedding",), ROW),
        Rule("encoder/positions", (f"{prefix}embeddings.position_embedding.weight",)),
        *rules.norm("encoder/pre_norm", f"{prefix}pre_layrnorm"),
        *layers("encoder", prefix),
        *rules.norm("encoder/norm", f"{prefix}post_layernorm"),
    ]


CLIP_VISION = clip_image("")
CLIP = [
    *clip_image("vision_model."),
    *text_tower("text_model."),
    *rules.dense("image_head", "visual_projection", bias=False),
    *rules.dense("text/head", "text_projection", bias=False),
    Rule(
        "log_scale", ("logit_scale",), rules.Layout(lambda theirs, heads: theirs[0].reshape(1), lambda ours: [ours[0]])
    ),
]


def size_name(config: Mapping[str, Any]) -> str:
    """wWIDTHdDEPTHhHEADSmMLP of a Hugging Face config section."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    missing = [k for k in keys if k not in config]
    if missing:
        raise UserError(f"config.json lacks {missing[0]!r}.")
    return "w{}d{}h{}m{}".format(*(config[k] for k in keys))


def activation(name: str) -> str:
    """Our name of an activation of theirs.

    Raises:
      UserError: there is none.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"config.json has the activation {name!r}; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def image_options(config: Mapping[str, Any], **rest) -> dict[str, Any]:
    """Options of an image tower from its section of config.json."""
    return {
        "encoder": f"{size_name(config)}/{config['patch_size']}",
        "res": config["image_size"],
        "activation": activation(config["hidden_act"]),
        "eps": config["layer_norm_eps"],
        "dtype": "float32",
    } | rest


def text_options(config: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """Of a text tower; its activation and eps are left to the image tower where they are the same."""
    act = activation(config["hidden_act"])
    return {
        "text": size_name(config),
        "vocab": config["vocab_size"],
        "length": config["max_position_embeddings"],
        "text_activation": "" if act == activation(vision["hidden_act"]) else act,
        "text_eps": rules.other_eps(config["layer_norm_eps"], vision["layer_norm_eps"]),
    }


def _end_of_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where CLIP's text tower is pooled: at the highest id if `eos_token_id` is 2, as transformers has it for the first
    models, which said so by mistake; else at the first place of that id.

    Raises:
      UserError: it is no id of the vocabulary.
    """
    end = config.get("eos_token_id", _CLIP_END)
    if end == 2 or ("eos_token_id" not in config and config["vocab_size"] <= _CLIP_END):
        return {"text_pool": "argmax"}
    if not isinstance(end, int) or not 0 <= end < config["vocab_size"]:
        raise UserError(
            f"config.json has text_config.eos_token_id={end!r}, by which texts are pooled; it should be one id below "
            f"vocab_size={config['vocab_size']}."
        )
    return {"text_pool": "eos", "text_end": end}


def heads_of(config: Mapping[str, Any]):
    """Number of heads by our parameter's name."""
    vision = config.get("vision_config", config)["num_attention_heads"]
    text = config.get("text_config", config)["num_attention_heads"]
    return lambda name: text if name.startswith("text/") else vision


# What transformers leaves out of config.json where it has its default.
_DEFAULTS = {
    "vision": dict(
        hidden_act="quick_gelu", layer_norm_eps=1e-5, image_size=224, hidden_size=768, intermediate_size=3072,
        num_hidden_layers=12, num_attention_heads=12, patch_size=32,
    ),
    "text": dict(
        hidden_act="quick_gelu", layer_norm_eps=1e-5, vocab_size=49408, hidden_size=512, intermediate_size=2048,
        num_hidden_layers=12, num_attention_heads=8, max_position_embeddings=77,
    ),
}  # fmt: skip


def read_clip(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any]):
    """(options, parameters) of a CLIPModel or CLIPVisionModel.

    CLIP's patch convolution has no bias, ours gets zeros.

    Raises:
      UserError: it is another model.
    """
    theirs = {k: v for k, v in theirs.items() if not k.endswith("position_ids")}
    vision = _DEFAULTS["vision"] | dict(config.get("vision_config", config))
    extra = dict(pool="cls", pre_norm=True, class_position=True, pixels="clip")
    if any(k.startswith("text_model.") for k in theirs):
        text = _DEFAULTS["text"] | dict(config.get("text_config", {}))
        options = TwoTowersOptions(
            **image_options(vision, **extra),
            **text_options(text, vision),
            **_end_of_text(text),
            text_causal=True,
            projection=config.get("projection_dim", len(theirs["visual_projection.weight"])),
        )
        both = {"vision_config": vision, "text_config": text}
        params = rules.read(theirs, CLIP, heads_of(both), "CLIP model") | {"bias": np.zeros(1, np.float32)}
    else:
        theirs = {k.removeprefix("vision_model."): v for k, v in theirs.items()}
        options = ImageOptions(**image_options(vision, **extra))
        params = rules.read(theirs, CLIP_VISION, lambda _: vision["num_attention_heads"], "CLIP image tower")
    return options, params | {"encoder/stem/bias": np.zeros(options.encoder_width, np.float32)}


def write_clip(options: TwoTowersOptions, params: Mapping[str, np.ndarray]):
    """(state dict, config) of a CLIPModel.

    Raises:
      UserError: the model is not one of CLIP's form.
    """
    check_form(options, CLIP_FORM | dict(text_causal=True, text_norm="pre"), "CLIP model")
    if options.text_pool not in ("argmax", "eos"):
        raise UserError(f"A CLIP model has model.text_pool='argmax' or 'eos'; this model has {options.text_pool!r}.")
    params = dict(params)
    for name, why in (("encoder/stem/bias", "a bias of its patch convolution"), ("bias", "an offset of its logits")):
        if np.any(params.pop(name)):
            raise UserError(f"A CLIP model has no place for {why}, and this model's is not zero.")
    size, patch = sizes.parse(options.encoder)
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": options.projection,
        "vision_config": section(size, their_activation(options.activation), options.eps)
        | {"image_size": options.res, "patch_size": patch},
        "text_config": text_section(options)
        | {
            "vocab_size": options.vocab,
            "max_position_embeddings": options.length,
            "eos_token_id": 2 if options.text_pool == "argmax" else options.text_end,
        },
    }
    return rules.write(params, CLIP, "CLIP model"), config


def fits(options: Any) -> bool:
    """Whether a model's two towers are rather CLIP's than SigLIP's."""
    return isinstance(options, TwoTowersOptions) and options.pool == "cls"


def read(source: Source) -> Weights:
    """A CLIP, or its image tower, with the pixels of its processor and its tokenizer."""
    options, params = read_clip(source.arrays, source.config)
    return assemble_folder(source, options, params, "CLIP")


def write(weights: Weights, target: Target) -> None:
    """Writes a folder for CLIPModel."""
    write_files(weights, target, *write_clip(weights.options, weights.params))


def assemble_folder(source: Source, options: Any, params: dict[str, np.ndarray], processor: str) -> Weights:
    """Weights of a folder with its tokenizer and the pixels of its processor (`pixels.of_hugging_face`)."""
    how = pixels.of_hugging_face(source.folder, processor, options.res)
    tokenizer = tokens.find(source.path)
    return assemble(source, options, params, resize="hugging_face", pixels=how, tokenizer=tokenizer)


def write_files(weights: Weights, target: Target, state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """Writes a folder for transformers: arrays, configuration, the processor of images, the tokenizer.

    Raises:
      UserError: there is something in it, or it can't be written.
    """
    folder = files.write_model(target.path, state, config)
    if Ability.IMAGES in abilities(weights.options):
        pixels.write_processor(folder, weights)
    if weights.tokenizer:
        own = pathlib.Path(weights.tokenizer)
        tokens.copy(weights.tokenizer, folder, tokens.NAMES_BY_SUFFIX.get(own.suffix, own.name), weights.clean)


def with_table(options: ImageOptions, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters with sine-cosine positions written out."""
    if options.positions == "learned":
        return dict(params)
    return {**params, "encoder/positions": sincos_2d(*options.grid, options.encoder_width)}


def their_activation(ours: str) -> str:
    """Their name of an activation of ours."""
    return "gelu_pytorch_tanh" if ours == "gelu_tanh" else ours


def text_section(options: TwoTowersOptions) -> dict[str, Any]:
    """What config.json says of a text tower."""
    act, eps = options.text_activation or options.activation, options.text_eps or options.eps
    return section(sizes.parse_size(options.text), their_activation(act), eps)


def section(size: sizes.Size, activation: str, eps: float) -> dict[str, Any]:
    """What config.json says of a transformer."""
    return {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": size.mlp,
        "hidden_act": activation,
        "layer_norm_eps": eps,
    }


def check_form(options: Any, wanted: Mapping[str, Any], what: str, *, kind: str = "ViT") -> None:
    """Raises UserError where the image encoder, or an option, is not as the other framework's model has it."""
    if options.encoder_kind.called != kind:
        raise UserError(f"A {what} has a {kind}; this model has model.encoder={options.encoder!r}.")
    for name, value in wanted.items():
        found = getattr(options, name, value)
        if found != value:
            raise UserError(f"A {what} has model.{name}={value!r}; this model has {found!r}.")
