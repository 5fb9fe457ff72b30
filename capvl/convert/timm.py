"""timm's Vision Transformers, in and out; and its Swins, whose names are the original's (`capvl.convert.swin`)."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import files, pixels, rules, swin
from capvl.convert.assembling import assemble
from capvl.convert.files import Source, Target
from capvl.convert.hugging_face import check_form, with_table
from capvl.convert.rules import CONV, ROW3, TABLE3, Rule
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.abilities import Ability, abilities
from capvl.models.pixels import PIXELS
from capvl.models.vision import ImageOptions
from capvl.nn.layers import ACTIVATIONS
from capvl.weights import Weights


def vit(options: ImageOptions) -> list[Rule]:
    """Rules of an encoder of these options."""
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
    if options.pre_norm:
        table += rules.norm("encoder/pre_norm", "norm_pre")
    if options.layer_scale:
        table += [Rule(f"{block}/scale{n}", (f"{layer}.ls{n}.gamma",)) for n in (1, 2)]
    if options.pool == "cls":
        table.append(Rule("encoder/cls", ("cls_token",), ROW3))
    if options.registers:
        table.append(Rule("encoder/registers", ("reg_token",), TABLE3))
    if options.pool == "map":
        table += [
            Rule("encoder/map/probe", ("attn_pool.latent",), ROW3),
            *rules.map_attention("encoder/map", "attn_pool.q", "attn_pool.kv", "attn_pool.proj"),
            *rules.norm("encoder/map/norm", "attn_pool.norm"),
            *rules.dense("encoder/map/mlp/up", "attn_pool.mlp.fc1"),
            *rules.dense("encoder/map/mlp/down", "attn_pool.mlp.fc2"),
        ]
    return table


_CLASSIFIER = ("head.weight", "head.bias")
# Names of timm that are plain ViTs; others have rotary or relative positions, or other blocks, under the same names.
_FAMILIES = (
    r"vit_[a-z0-9]+_patch\d+(_(plus|clip|quickgelu|siglip|gap|map|dinov2|tipsv2|reg\d|miil|36x1|\d+))+"
    r"|deit3?_[a-z]+_patch\d+_\d+|flexivit_[a-z]+"
)
_TANH = r"vit_((base_patch32|giantopt_patch16|so400m_patch16)_siglip.*|large_patch16_siglip(_gap)?_512)"
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
# Arguments of a model that say nothing that its arrays, or the evaluation, don't say.
_UNUSED = r"img_size|patch_size|embed_dim|depth|num_heads|mlp_ratio|class_token|num_classes|fc_norm|.*drop.*|act_layer"
_UNUSED += r"|global_pool|init_values|reg_tokens|no_embed_class|pre_norm|qkv_bias|dynamic_img_size|weight_init|fix_init"
_REQUIRED = dict(
    in_chans=3, pos_embed="learn", qk_norm=False, dynamic_img_pad=False, pool_include_prefix=False, final_norm=True
)


def architecture(name: str, width: int) -> dict[str, Any]:
    """What a timm ViT of this name has that its arrays don't tell: heads, activation and eps.

    Raises:
      UserError: the name is not of a ViT that is known.
    """
    if not re.fullmatch(_FAMILIES, name):
        raise UserError(
            f"timm's architecture {name!r} is not known; of timm plain ViTs (vit_*_patch*, deit*, flexivit_*) and "
            f"Swins (swin_*) are read."
        )
    heads = _HEADS.get(width, width // 64)
    if name.startswith(("vit_giantopt_", "vit_base_patch16_gap_")):
        heads = 16
    tanh = re.fullmatch(_TANH, name)
    return {
        "heads": max(1, heads),
        "activation": "quick_gelu" if "quickgelu" in name else "gelu_tanh" if tanh else "gelu",
        "eps": 1e-5 if "_clip_" in name else 1e-6,
    }


def read_timm(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any], heads: int = 0):
    """(options, parameters) of a timm VisionTransformer, without its classifier.

    Args:
      theirs: state dict.
      config: timm's config.json.
      heads: of the attention; 0 for the architecture's.

    Raises:
      UserError: it is another model, or of a form that ours has not.
    """
    name = config.get("architecture")
    if not name:
        raise UserError("timm's config.json, which names the architecture, is not beside the weights.")
    arguments = dict(config.get("model_args") or {})
    for key, value in arguments.items():
        if not re.fullmatch(_UNUSED, key) and value is not None and value != _REQUIRED.get(key, False):
            raise UserError(f"timm's model_args have {key}={value!r}, which isn't known here.")
    if "patch_embed.proj.weight" not in theirs or "pos_embed" not in theirs:
        raise UserError("The weights lack 'patch_embed.proj.weight' or 'pos_embed', so they are not of a timm ViT.")
    width, _, patch, _ = theirs["patch_embed.proj.weight"].shape
    known = architecture(name, width)
    heads = heads or arguments.get("num_heads") or known["heads"]
    depth = len({k.split(".")[1] for k in theirs if k.startswith("blocks.")})
    cls, registers = "cls_token" in theirs, len(theirs.get("reg_token", [()])[0])
    grid, prefix = _grid(theirs["pos_embed"].shape[1], cls, registers)
    options = ImageOptions(
        encoder=f"w{width}d{depth}h{heads}m{theirs['blocks.0.mlp.fc1.weight'].shape[0]}/{patch}",
        res=grid * patch,
        pool=_pool(theirs, arguments.get("global_pool", config.get("global_pool"))),
        class_position=cls and prefix > 0,
        registers=registers,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in theirs else 0.0,
        pre_norm="norm_pre.weight" in theirs,
        activation=_activation(arguments.get("act_layer") or known["activation"]),
        eps=known["eps"],
        dtype="float32",
    )
    theirs = dict(theirs)
    if "patch_embed.proj.bias" not in theirs:
        theirs["patch_embed.proj.bias"] = np.zeros(width, np.float32)
    for i in range(depth):  # Without biases of queries, keys and values; zeros are the same.
        theirs.setdefault(f"blocks.{i}.attn.qkv.bias", np.zeros(3 * width, np.float32))
    return options, rules.read(theirs, vit(options), lambda _: heads, "timm ViT", _CLASSIFIER)


def _activation(name: Any) -> str:
    if name not in ACTIVATIONS:
        raise UserError(f"timm's act_layer={name!r} is none of {', '.join(ACTIVATIONS)}.")
    return name


def _grid(rows: int, cls: bool, registers: int) -> tuple[int, int]:
    """(side of the grid, rows before its own) of a table of positions."""
    for prefix in (0, int(cls)):
        side = round((rows - prefix) ** 0.5)
        if side * side == rows - prefix:
            return side, prefix
    raise UserError(
        f"The {rows} positions are those of no square of patches, with or without a class token"
        + (f" ({registers} registers have positions of their own)." if registers else ".")
    )


def _pool(theirs: Mapping[str, np.ndarray], declared: str | None) -> str:
    """Our pooling of timm's.

    Args:
      theirs: state dict.
      declared: global_pool of the configuration; None where it is left to the arrays.
    """
    cls = "cls_token" in theirs
    if "fc_norm.weight" in theirs:
        raise UserError("The timm ViT normalises behind its pooling (fc_norm), which ours does not.")
    has = "a" if cls else "no"
    found = "map" if "attn_pool.latent" in theirs else "token" if cls else "avg"
    if (declared or found) != found or (cls and found == "map"):
        raise UserError(
            f"The timm ViT has global_pool={declared or found!r} and {has} class token; known are 'token' with "
            f"one, 'avg' and 'map' without."
        )
    return {"token": "cls", "avg": "mean", "map": "map"}[found]


def write_timm(options: ImageOptions, params: Mapping[str, np.ndarray]):
    """(state dict, config.json) of the encoder as a timm VisionTransformer: `timm.create_model("local-dir:FOLDER")`.

    Raises:
      UserError: the encoder is not one of timm's form.
    """
    check_form(options, dict(stem="patch", pre_norm=False, eps=1e-6), "timm ViT")
    if options.registers and options.class_position:
        raise UserError("A timm ViT with registers has no position of the class token alone, and this model has.")
    params = {k: v for k, v in with_table(options, params).items() if k.startswith("encoder/")}
    size, patch = sizes.parse(options.encoder)
    cls, pooling = options.pool == "cls", options.pool == "map"
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
        "no_embed_class": not options.class_position,
        "global_pool": "map" if pooling else "token" if cls else "avg",
        "fc_norm": False,
        "init_values": options.layer_scale or None,
        "reg_tokens": options.registers,
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
    return rules.write(params, vit(options), "timm ViT"), config


def read(source: Source) -> Weights:
    """An encoder with the pixels of its pretrained_cfg."""
    if str(source.config.get("architecture")).startswith("swin_"):
        options, params = swin.read_timm(source.arrays, source.config)
    else:
        options, params = read_timm(source.arrays, source.config, source.heads)
    processor = pixels.of_timm(source.config.get("pretrained_cfg") or {}, options.res)
    return assemble(source, options, params, resize="timm", pixels=processor)


def write(weights: Weights, target: Target) -> None:
    """Writes the image tower as a folder for `timm.create_model`.

    Raises:
      UserError: the model has none, or it is not of timm's form, or can't be written.
    """
    if Ability.IMAGES not in abilities(weights.options):
        raise UserError("timm has image models only, and this model has no image tower.")
    to_timm = swin.write_timm if swin.fits(weights.options) else write_timm
    state, config = to_timm(weights.options, weights.params)
    config["pretrained_cfg"] |= pixels.to_timm(weights)
    files.write_model(target.path, state, config)
