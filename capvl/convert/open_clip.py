"""open_clip's two towers in: CLIP, and towers whose image side is timm's (SigLIP)."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import pixels, rules, tokens
from capvl.convert.assembling import assemble
from capvl.convert.files import Source
from capvl.convert.rules import CONV, LINEAR, ROW, SCALAR, Rule
from capvl.convert.timm import read_timm
from capvl.errors import UserError
from capvl.models.two_towers import TwoTowersOptions
from capvl.weights import Weights


def _residual_blocks(ours: str, theirs: str) -> list[Rule]:
    block, layer = f"{ours}/blocks/{{i}}", f"{theirs}transformer.resblocks.{{i}}"
    return [
        *rules.norm(f"{block}/norm1", f"{layer}.ln_1"),
        *rules.packed_attention(
            f"{block}/attn", f"{layer}.attn.in_proj_weight", f"{layer}.attn.in_proj_bias", f"{layer}.attn.out_proj"
        ),
        *rules.norm(f"{block}/norm2", f"{layer}.ln_2"),
        *rules.dense(f"{block}/mlp/up", f"{layer}.mlp.c_fc"),
        *rules.dense(f"{block}/mlp/down", f"{layer}.mlp.c_proj"),
    ]


_IMAGE = [
    Rule("encoder/stem/kernel", ("visual.conv1.weight",), CONV),
    Rule("encoder/cls", ("visual.class_embedding",), ROW),
    Rule("encoder/positions", ("visual.positional_embedding",)),
    *_residual_blocks("encoder", "visual."),
    *rules.norm("encoder/norm", "visual.ln_post"),
    Rule("image_head/kernel", ("visual.proj",)),
]
_TEXT = [
    Rule("text/tokens", ("token_embedding.weight",)),
    Rule("text/positions", ("positional_embedding",)),
    *_residual_blocks("text", ""),
    *rules.norm("text/norm", "ln_final"),
    Rule("log_scale", ("logit_scale",), SCALAR),
    Rule("bias", ("logit_bias",), SCALAR),
]
_TEXT_HEAD = [Rule("text/head/kernel", ("text_projection",))]
_TEXT_HEAD_WITH_BIAS = [
    Rule("text/head/kernel", ("text_projection.weight",), LINEAR),
    Rule("text/head/bias", ("text_projection.bias",)),
]

# Keys of a configuration that say nothing that the arrays don't say, and what the others must be.
_UNUSED = (
    r"layers|width|heads|head_width|mlp_ratio|patch_size|image_size|patch_dropout|pos_embed_type|attn_pooler_.*|timm_.*"
    r"|context_length|vocab_size|pad_id|eos_id|hf_tokenizer_name|tokenizer_kwargs|norm_kwargs|act_kwargs|no_ln_pre"
    r"|no_causal_mask|proj_bias|pool_type|hf_(model_pretrained|proj_type|pooler_type)|final_ln_after_pool"
)
_REQUIRED = {"proj_type": "linear", "block_type": "default"}
_UNUSED_MODEL = "embed_dim|vision_cfg|text_cfg|quick_gelu|custom_text|init_logit_.*|nonscalar_logit_scale|output_dict"


def read_open_clip(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any], heads: int = 0):
    """(options, parameters) of open_clip's CLIP, or of two towers whose image side is a timm ViT (SigLIP).

    Args:
      theirs: state dict.
      config: open_clip_config.json, or its model_cfg.
      heads: of both towers; 0 for the configuration's.

    Raises:
      UserError: it is another model, or of a form that ours has not.
    """
    model = dict(config.get("model_cfg", config))
    if "vision_cfg" not in model or "text_cfg" not in model:
        raise UserError(
            "open_clip_config.json, which alone tells activation, mask and pooling, is not beside the weights or lacks "
            "'vision_cfg' or 'text_cfg'."
        )
    vision, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
    _check(model, _UNUSED_MODEL, "model_cfg")
    _check(vision, _UNUSED, "vision_cfg")
    _check(text, _UNUSED, "text_cfg")
    # A text tower of a class of its own has a prefix.
    theirs = {k.removeprefix("text."): v for k, v in theirs.items() if not k.endswith("attn_mask")}
    if "token_embedding.weight" not in theirs:
        raise UserError("The weights lack 'token_embedding.weight', so they are not of an open_clip model.")
    theirs.setdefault("logit_bias", np.zeros(1, np.float32))
    visual = {k: v for k, v in theirs.items() if k.startswith("visual.")}
    quick = bool(model.get("quick_gelu"))
    if any(k.startswith("visual.trunk.") for k in visual):
        image, image_params = _timm_image(visual, vision, heads)
    else:
        image, image_params = _image(visual, vision, quick, heads)
    options, params = _text({k: v for k, v in theirs.items() if k not in visual}, text, image, quick, heads)
    if options["projection_bias"]:  # Of the text alone.
        params["image_head/bias"] = np.zeros(options["projection"], np.float32)
    return TwoTowersOptions(**options), params | image_params


def _check(values: Mapping[str, Any], unused: str, where: str) -> None:
    """Raises UserError where a configuration has what isn't known here."""
    for key, value in values.items():
        if not re.fullmatch(unused, key) and value is not None and value != _REQUIRED.get(key, False):
            raise UserError(f"open_clip's {where} has {key}={value!r}, which isn't known here.")


def _kind(config: Mapping[str, Any], quick: bool, where: str) -> tuple[str, float]:
    """(activation, eps) of a tower of open_clip's own."""
    act, norm = dict(config.get("act_kwargs") or {}), dict(config.get("norm_kwargs") or {})
    approximate, eps = act.pop("approximate", "none"), norm.pop("eps", 1e-5)
    if act or norm or approximate not in ("none", "tanh") or (quick and approximate == "tanh"):
        raise UserError(
            f"open_clip's {where} has act_kwargs={config.get('act_kwargs')} and norm_kwargs="
            f"{config.get('norm_kwargs')} with quick_gelu={quick}, which isn't known here."
        )
    return ("quick_gelu" if quick else "gelu_tanh" if approximate == "tanh" else "gelu"), eps


def _depth(theirs: Mapping[str, np.ndarray], prefix: str) -> int:
    return len({k[len(prefix) :].split(".")[0] for k in theirs if k.startswith(prefix)})


def _image(theirs: Mapping[str, np.ndarray], vision: Mapping[str, Any], quick: bool, heads: int):
    """(options, parameters) of open_clip's own ViT."""
    if "visual.conv1.weight" not in theirs or "visual.class_embedding" not in theirs:
        raise UserError("The weights lack 'visual.conv1.weight': of open_clip's image towers only ViTs are known.")
    pool = vision.get("pool_type", "tok")
    if pool != "tok":
        raise UserError(f"open_clip's vision_cfg has pool_type={pool!r}; only 'tok', the class token, is known here.")
    width, _, patch, _ = theirs["visual.conv1.weight"].shape
    heads = heads or width // vision.get("head_width", 64)
    blocks = "visual.transformer.resblocks."
    activation, eps = _kind(vision, quick, "vision_cfg")
    options = dict(
        encoder=f"w{width}d{_depth(theirs, blocks)}h{heads}m{len(theirs[f'{blocks}0.mlp.c_fc.weight'])}/{patch}",
        res=round((len(theirs["visual.positional_embedding"]) - 1) ** 0.5) * patch,
        pool="cls",
        pre_norm=not vision.get("no_ln_pre"),
        class_position=True,
        activation=activation,
        eps=eps,
        projection=theirs["visual.proj"].shape[1],
        dtype="float32",
    )
    table = _IMAGE + (rules.norm("encoder/pre_norm", "visual.ln_pre") if options["pre_norm"] else [])
    params = rules.read(theirs, table, lambda _: heads, "open_clip CLIP")
    return options, params | {"encoder/stem/bias": np.zeros(width, np.float32)}


def _timm_image(theirs: Mapping[str, np.ndarray], vision: Mapping[str, Any], heads: int):
    """(options, parameters) of a timm ViT in open_clip."""
    projection = vision.get("timm_proj", "linear")
    if projection != "none":
        raise UserError(f"open_clip's vision_cfg has timm_proj={projection!r}; only 'none' is known here.")
    trunk = {k.removeprefix("visual.trunk."): v for k, v in theirs.items() if k.startswith("visual.trunk.")}
    pool = vision.get("timm_pool", "avg")
    described = {"architecture": vision.get("timm_model_name"), "global_pool": pool}
    image, params = read_timm(trunk, described, heads)
    rest = sorted(k for k in theirs if not k.startswith("visual.trunk."))
    if rest:
        raise UserError(f"The weights have {len(rest)} arrays behind timm's trunk that aren't known: {rest[0]}.")
    return vars(image) | {"projection": 0}, params


def _text(theirs: dict[str, np.ndarray], text: Mapping[str, Any], image: dict[str, Any], quick: bool, heads: int):
    """(options, parameters) of the text tower, the options with those of the image tower."""
    pool = text.get("pool_type", "argmax")
    if text.get("hf_model_name") or pool not in ("argmax", "eos", "first", "last"):
        raise UserError(
            f"open_clip's text_cfg has hf_model_name={text.get('hf_model_name')!r} and pool_type={pool!r}; known are "
            f"open_clip's own text towers with 'argmax', 'eos', 'first' or 'last'."
        )
    if (text.get("tokenizer_kwargs") or {}).get("strip_sep_token"):
        raise UserError("open_clip's text_cfg has a tokenizer with strip_sep_token, which isn't known here.")
    vocab, width = theirs["token_embedding.weight"].shape
    heads = heads or text.get("heads", 8)
    mlp = len(theirs["transformer.resblocks.0.mlp.c_fc.weight"])
    activation, eps = _kind(text, quick, "text_cfg")
    bias = "text_projection.bias" in theirs
    options = image | dict(
        text=f"w{width}d{_depth(theirs, 'transformer.resblocks.')}h{heads}m{mlp}",
        vocab=vocab,
        length=len(theirs["positional_embedding"]),
        text_pool=pool,
        text_end=text.get("eos_id", 2) if pool == "eos" else 0,
        text_causal=not text.get("no_causal_mask"),
        text_activation="" if activation == image["activation"] else activation,
        text_eps=rules.other_eps(eps, image["eps"]),
        projection_bias=bias and image["projection"] > 0,
    )
    table = _TEXT + (_TEXT_HEAD_WITH_BIAS if bias else _TEXT_HEAD)
    params = rules.read(theirs, table, lambda _: heads, "open_clip text tower")
    if not image["projection"] and not bias:
        params["text/head/bias"] = np.zeros(params["text/head/kernel"].shape[1], np.float32)
    return options, params


def read(source: Source) -> Weights:
    """Two towers with the pixels of preprocess_cfg, their tokenizer, its cleaning, and the padding that they read."""
    options, params = read_open_clip(source.arrays, source.config, source.heads)
    text, tokenizer = source.config.get("model_cfg", source.config)["text_cfg"], tokens.find(source.path)
    if options.text_pool == "last":  # Which reads the padding.
        options = dataclasses.replace(options, text_pad=_padding(tokenizer, text))
    return assemble(
        source,
        options,
        params,
        resize="timm",
        pixels=pixels.of_open_clip(source.config),
        tokenizer=tokenizer,
        clean=tokens.open_clip_cleaning(text, tokenizer) if tokenizer else "",
    )


def _padding(tokenizer: str, text: Mapping[str, Any]) -> int:
    """Id of the padding that a text tower reads."""
    found = tokens.padding(tokenizer)
    if found is None:
        known = {"SigLIP2": 0, "SigLIP": 1}  # Theirs have these, whatever their size.
        found = next((i for name, i in known.items() if name in str(text.get("hf_tokenizer_name"))), None)
    if found is None:
        raise UserError(
            "The text tower reads its padding (pool_type='last'), and no tokenizer beside says which id it is."
        )
    return found
