"""timm's Vision Transformers, in and out, and open_clip's two towers in."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import rules
from capvl.convert.hugging_face import PLAIN_FORM, check_form, with_table
from capvl.convert.rules import CONV, LINEAR, ROW, ROW3, SCALAR, TABLE3, Rule
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.two_towers import TwoTowersOptions
from capvl.models.vit import PIXELS, ViTOptions


def _vit(cls: bool, pooling: bool) -> list[Rule]:
    block, layer = "encoder/blocks/{i}", "blocks.{i}"
    table = [
        Rule("encoder/stem/kernel", ("patch_embed.proj.weight",), CONV),
        Rule("encoder/stem/bias", ("patch_embed.proj.bias",)),
        Rule("encoder/positions", ("pos_embed",), TABLE3),
        *rules.norm(f"{block}/norm1", f"{layer}.norm1"),
        *rules.packed_attention(
            f"{block}/attn", f"{layer}.attn.qkv.weight", f"{layer}.attn.qkv.bias", f"{layer}.attn.proj"
        ),
        *rules.norm(f"{block}/norm2", f"{layer}.norm2"),
        *rules.dense(f"{block}/mlp/up", f"{layer}.mlp.fc1"),
        *rules.dense(f"{block}/mlp/down", f"{layer}.mlp.fc2"),
        *rules.norm("encoder/norm", "norm"),
    ]
    if cls:
        table.append(Rule("encoder/cls", ("cls_token",), ROW3))
    if pooling:
        table += [
            Rule("encoder/map/probe", ("attn_pool.latent",), ROW3),
            *rules.map_attention("encoder/map", "attn_pool.q", "attn_pool.kv", "attn_pool.proj"),
            *rules.norm("encoder/map/norm", "attn_pool.norm"),
            *rules.dense("encoder/map/mlp/up", "attn_pool.mlp.fc1"),
            *rules.dense("encoder/map/mlp/down", "attn_pool.mlp.fc2"),
        ]
    return table


_CLASSIFIER = ("head.weight", "head.bias")


def _shapes(theirs: Mapping[str, np.ndarray], heads: int) -> dict[str, Any]:
    """Size, patch and resolution of a timm ViT, from its arrays."""
    if "patch_embed.proj.weight" not in theirs or "pos_embed" not in theirs:
        raise UserError("The weights lack 'patch_embed.proj.weight' or 'pos_embed', so they are not of a timm ViT.")
    width, _, patch, _ = theirs["patch_embed.proj.weight"].shape
    depth = len({k.split(".")[1] for k in theirs if k.startswith("blocks.")})
    heads = heads or max(1, width // 64)
    cls = "cls_token" in theirs
    grid = round((theirs["pos_embed"].shape[1] - cls) ** 0.5)
    mlp = theirs["blocks.0.mlp.fc1.weight"].shape[0]
    return {"encoder": f"w{width}d{depth}h{heads}m{mlp}/{patch}", "res": grid * patch}


def read_timm(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any], heads: int = 0):
    """(options, parameters) of a timm VisionTransformer, without its classifier.

    Args:
      theirs: state dict.
      config: timm's config.json, or {}.
      heads: of the attention; 0 for width / 64, timm's own rule.

    Raises:
      UserError: it is another model.
    """
    arguments = dict(config.get("model_args") or {})
    pretrained = dict(config.get("pretrained_cfg") or {})
    shapes = _shapes(theirs, heads or arguments.get("num_heads", 0))
    cls, pooling = "cls_token" in theirs, "attn_pool.latent" in theirs
    siglip = "siglip" in config.get("architecture", "")
    mean = tuple(pretrained.get("mean", PIXELS["half"][0]))
    pixels = next((name for name, (m, _) in PIXELS.items() if np.allclose(m, mean)), None)
    if pixels is None:
        raise UserError(f"The pixels' mean {mean} is none of {', '.join(PIXELS)}.")
    act = arguments.get("act_layer", "gelu_tanh" if pooling or siglip else "gelu")
    options = ViTOptions(
        **shapes,
        pool="map" if pooling else "cls" if cls else "mean",
        class_position=cls,
        activation=act,
        pixels=pixels,
        dtype="float32",
    )
    count = sizes.parse(options.encoder)[0].heads
    return options, rules.read(theirs, _vit(cls, pooling), lambda _: count, "timm ViT", _CLASSIFIER)


def write_timm(options: ViTOptions, params: Mapping[str, np.ndarray]):
    """(state dict, config.json) of the encoder as a timm VisionTransformer: `timm.create_model("local-dir:FOLDER")`.

    Raises:
      UserError: the encoder is not one of timm's form.
    """
    check_form(options, PLAIN_FORM | dict(pre_norm=False), "timm ViT")
    params = {k: v for k, v in with_table(options, params).items() if k.startswith("encoder/")}
    size, patch = sizes.parse(options.encoder)
    cls, pooling = options.pool == "cls", options.pool == "map"
    if cls and not options.class_position:  # timm's class token has a position: zero.
        table = params["encoder/positions"]
        params["encoder/positions"] = np.concatenate([np.zeros_like(table[:1]), table])
    mean, std = PIXELS[options.pixels]
    arguments = {
        "img_size": options.res,
        "patch_size": patch,
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
        # timm takes the whole part of width times this.
        "mlp_ratio": (size.mlp + 0.5) / size.width,
        "class_token": cls,
        "global_pool": "map" if pooling else "token" if cls else "avg",
        "fc_norm": False,
        "act_layer": options.activation,
        "num_classes": 0,
    }
    config = {
        "architecture": "vit_base_patch16_siglip_224" if pooling else "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": size.width,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, options.res, options.res],
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return rules.write(params, _vit(cls, pooling), "timm ViT"), config


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


OPEN_CLIP = [
    Rule("encoder/stem/kernel", ("visual.conv1.weight",), CONV),
    Rule("encoder/cls", ("visual.class_embedding",), ROW),
    Rule("encoder/positions", ("visual.positional_embedding",)),
    *rules.norm("encoder/pre_norm", "visual.ln_pre"),
    *_residual_blocks("encoder", "visual."),
    *rules.norm("encoder/norm", "visual.ln_post"),
    Rule("image_head/kernel", ("visual.proj",)),
    Rule("text/tokens", ("token_embedding.weight",)),
    Rule("text/positions", ("positional_embedding",)),
    *_residual_blocks("text", ""),
    *rules.norm("text/norm", "ln_final"),
    Rule("text/head/kernel", ("text_projection",)),
    Rule("log_scale", ("logit_scale",), SCALAR),
]
_OPEN_CLIP_TEXT = [
    Rule("text/tokens", ("text.token_embedding.weight",)),
    Rule("text/positions", ("text.positional_embedding",)),
    *_residual_blocks("text", "text."),
    *rules.norm("text/norm", "text.ln_final"),
    Rule("text/head/kernel", ("text.text_projection.weight",), LINEAR),
    Rule("text/head/bias", ("text.text_projection.bias",)),
    Rule("log_scale", ("logit_scale",), SCALAR),
    Rule("bias", ("logit_bias",), SCALAR),
]


def read_open_clip(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any], heads: int = 0):
    """(options, parameters) of open_clip's CLIP, or of its SigLIP, whose image tower is a timm ViT.

    Args:
      theirs: state dict.
      config: open_clip_config.json, or {}: then heads are width / 64 and the activation is exact GELU.
      heads: of both towers; 0 for the configuration's.

    Raises:
      UserError: it is another model.
    """
    theirs = {k: v for k, v in theirs.items() if k != "attn_mask" and not k.endswith(".attn_mask")}
    model = dict(config.get("model_cfg", config))
    vision, text = dict(model.get("vision_cfg") or {}), dict(model.get("text_cfg") or {})
    siglip = any(k.startswith("visual.trunk.") for k in theirs)
    tokens, positions = ("text." * siglip + name for name in ("token_embedding.weight", "positional_embedding"))
    if tokens not in theirs:
        raise UserError(f"The weights lack {tokens!r}, so they are not of an open_clip model.")
    vocab, text_width = theirs[tokens].shape
    prefix = "text." * siglip + "transformer.resblocks."
    text_depth = len({k[len(prefix) :].split(".")[0] for k in theirs if k.startswith(prefix)})
    text_mlp = theirs[f"{prefix}0.mlp.c_fc.weight"].shape[0]
    text_heads = heads or text.get("heads", max(1, text_width // 64))
    shared = dict(
        text=f"w{text_width}d{text_depth}h{text_heads}m{text_mlp}", vocab=vocab, length=len(theirs[positions])
    )
    if siglip:
        trunk = {k.removeprefix("visual.trunk."): v for k, v in theirs.items() if k.startswith("visual.trunk.")}
        image, params = read_timm(trunk, {}, heads)
        rest = {k: v for k, v in theirs.items() if not k.startswith("visual.trunk.")}
        params |= rules.read(rest, _OPEN_CLIP_TEXT, lambda _: text_heads, "open_clip SigLIP")
        return TwoTowersOptions(**(vars(image) | shared), text_pad=1), params
    if "visual.conv1.weight" not in theirs:
        raise UserError("The weights lack 'visual.conv1.weight': of open_clip's image towers only ViTs are known.")
    width, _, patch, _ = theirs["visual.conv1.weight"].shape
    depth = len({m[1] for k in theirs if (m := re.match(r"visual\.transformer\.resblocks\.(\d+)\.", k))})
    image_heads = heads or width // vision.get("head_width", 64) or 1
    mlp = theirs["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    grid = round((len(theirs["visual.positional_embedding"]) - 1) ** 0.5)
    options = TwoTowersOptions(
        encoder=f"w{width}d{depth}h{image_heads}m{mlp}/{patch}",
        res=grid * patch,
        pool="cls",
        pre_norm=True,
        class_position=True,
        pixels="clip",
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        eps=1e-5,
        text_pool="argmax",
        text_causal=True,
        projection=theirs["visual.proj"].shape[1],
        dtype="float32",
        **shared,
    )
    params = rules.read(
        theirs, OPEN_CLIP, lambda name: text_heads if name.startswith("text/") else image_heads, "open_clip CLIP"
    )
    zeros = {"encoder/stem/bias": np.zeros(width, np.float32), "bias": np.zeros(1, np.float32)}
    return options, params | zeros
