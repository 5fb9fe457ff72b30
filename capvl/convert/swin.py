"""Swin, in and out: by the names of the original code, which X-VLM has too, of timm and of Hugging Face."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import rules
from capvl.convert.files import Source, Target
from capvl.convert.hugging_face import activation, assemble_folder, check_form, their_activation, write_files
from capvl.convert.rules import CONV, Rule
from capvl.errors import UserError
from capvl.models.abilities import Ability, abilities
from capvl.models.pixels import PIXELS
from capvl.models.swin import SwinKind
from capvl.models.vision import ImageOptions
from capvl.weights import Weights

# Derived from the sizes alone.
_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")
EPS = 1e-5
FORM = dict(pool="mean", pad_windows=False, level_norms=False)
"""Options of the Swins that classify, of which other frameworks and X-VLM have the encoder."""


def original(stages: int, merge_at: int = 0, level_norms: bool = False) -> list[Rule]:
    """Rules of the original names (github.com/microsoft/Swin-Transformer), which X-VLM has too.

    Args:
      stages: how many.
      merge_at: number that the merging behind a stage has, from that of the stage on; timm's is of the next.
      level_norms: each level but the first has a norm with its number, as in detectors; else the last alone.
    """
    last = stages - 1
    table = [
        Rule("encoder/stem/kernel", ("patch_embed.proj.weight",), CONV),
        Rule("encoder/stem/bias", ("patch_embed.proj.bias",)),
        *rules.norm("encoder/stem_norm", "patch_embed.norm"),
        *rules.norm("encoder/norm", f"norm{last}" if level_norms else "norm"),
    ]
    for stage in range(1, last if level_norms else 1):
        table += rules.norm(f"encoder/stages/{stage}/norm", f"norm{stage}")
    for stage in range(stages):
        block, theirs = f"encoder/stages/{stage}/blocks/{{i}}", f"layers.{stage}.blocks.{{i}}"
        qkv = f"{theirs}.attn.qkv"
        table += [
            *rules.norm(f"{block}/norm1", f"{theirs}.norm1"),
            *rules.packed_attention(f"{block}/attn", f"{qkv}.weight", f"{qkv}.bias", f"{theirs}.attn.proj"),
            Rule(f"encoder/stages/{stage}/offsets/{{i}}", (f"{theirs}.attn.relative_position_bias_table",)),
            *rules.norm(f"{block}/norm2", f"{theirs}.norm2"),
            *rules.dense(f"{block}/mlp/up", f"{theirs}.mlp.fc1"),
            *rules.dense(f"{block}/mlp/down", f"{theirs}.mlp.fc2"),
        ]
    return table + _merges(stages, "layers.{}.downsample", merge_at)


def hugging_face(stages: int) -> list[Rule]:
    """Rules of transformers' names on the hub."""
    table = [
        Rule("encoder/stem/kernel", ("embeddings.patch_embeddings.projection.weight",), CONV),
        Rule("encoder/stem/bias", ("embeddings.patch_embeddings.projection.bias",)),
        *rules.norm("encoder/stem_norm", "embeddings.norm"),
        *rules.norm("encoder/norm", "layernorm"),
    ]
    for stage in range(stages):
        block, theirs = f"encoder/stages/{stage}/blocks/{{i}}", f"encoder.layers.{stage}.blocks.{{i}}"
        own = f"{theirs}.attention.self"
        q, k, v = (f"{own}.{part}" for part in ("query", "key", "value"))
        table += [
            *rules.norm(f"{block}/norm1", f"{theirs}.layernorm_before"),
            *rules.attention(f"{block}/attn", q, k, v, f"{theirs}.attention.output.dense"),
            Rule(f"encoder/stages/{stage}/offsets/{{i}}", (f"{own}.relative_position_bias_table",)),
            *rules.norm(f"{block}/norm2", f"{theirs}.layernorm_after"),
            *rules.dense(f"{block}/mlp/up", f"{theirs}.intermediate.dense"),
            *rules.dense(f"{block}/mlp/down", f"{theirs}.output.dense"),
        ]
    return table + _merges(stages, "encoder.layers.{}.downsample", 0)


def _merges(stages: int, theirs: str, at: int) -> list[Rule]:
    table = []
    for stage in range(stages - 1):
        merge, name = f"encoder/stages/{stage}/merge", theirs.format(stage + at)
        table += [
            *rules.norm(f"{merge}/norm", f"{name}.norm"),
            *rules.dense(f"{merge}/out", f"{name}.reduction", bias=False),
        ]
    return table


def heads_by_stage(heads: list[int]):
    """Number of heads by our parameter's name."""

    def of(name: str) -> int:
        found = re.search(r"stages/(\d+)/", name)
        return heads[int(found[1])] if found else 1

    return of


def without_buffers(theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their arrays but those that follow from the sizes."""
    return {k: v for k, v in theirs.items() if not k.endswith(_BUFFERS)}


@dataclasses.dataclass(frozen=True)
class Names:
    """Their names from which the sizes are read.

    Attributes:
      stem: kernel of the patch embedding.
      table: of offsets, by stage and block.
    """

    stem: str
    table: str


ORIGINAL = Names("patch_embed.proj.weight", "layers.{}.blocks.{}.attn.relative_position_bias_table")
HUGGING_FACE = Names(
    "embeddings.patch_embeddings.projection.weight",
    "encoder.layers.{}.blocks.{}.attention.self.relative_position_bias_table",
)


def options_of(theirs: Mapping[str, np.ndarray], names: Names, res: int, **rest) -> tuple[ImageOptions, list[int]]:
    """(options, heads of each stage) of a Swin with these arrays.

    Args:
      theirs: state dict.
      names: of theirs.
      res: side of its images; 0 where it is not known: that whose last stage is one window, as of all released ones.
      rest: other options; without them as the original code has them.

    Raises:
      UserError: the arrays are not a Swin's, or its windows are not those of ours at `res`.
    """
    if names.stem not in theirs or names.table.format(0, 0) not in theirs:
        missing = next(n for n in (names.stem, names.table.format(0, 0)) if n not in theirs)
        raise UserError(f"The weights lack {missing!r}, so they are not of a Swin.")
    width, _, patch, _ = theirs[names.stem].shape
    depths, heads, windows = [], [], []
    while names.table.format(len(depths), 0) in theirs:
        rows, count = theirs[names.table.format(len(depths), 0)].shape
        side = (math.isqrt(rows) + 1) // 2
        if (2 * side - 1) ** 2 != rows:
            raise UserError(f"The Swin's table of {rows} offsets is not that of a square window.")
        depths.append(next(i for i in range(len(theirs)) if names.table.format(len(heads), i) not in theirs))
        heads.append(count)
        windows.append(side)
    name = f"swin-w{width}d{'-'.join(map(str, depths))}h{'-'.join(map(str, heads))}/{patch}"
    kind = SwinKind.parse(name)
    how = dict(activation="gelu", eps=EPS, dtype="float32") | rest
    options = ImageOptions(encoder=name, res=res or windows[-1] * kind.stride, window=windows[0], **how)
    if kind.windows(options) != windows:
        raise UserError(
            f"The Swin's tables are of windows {windows}, and at {options.res} pixels they should be of "
            f"{kind.windows(options)}."
        )
    return options, heads


_CLASSIFIER = ("head.weight", "head.bias")
_TIMM_CLASSIFIER = ("head.fc.weight", "head.fc.bias")
_UNUSED = (
    r"img_size|patch_size|embed_dim|depths|num_heads|window_size|mlp_ratio|num_classes|.*drop.*|qkv_bias|weight_init"
)
_UNUSED += r"|strict_img_size|dynamic_img_size|head_dim"


def read_original(theirs: Mapping[str, np.ndarray], res: int = 0):
    """(options, parameters) of the original code's Swin, without its classifier; `res` as in `options_of`.

    Raises:
      UserError: it is another model.
    """
    theirs = without_buffers(theirs)
    options, heads = options_of(theirs, ORIGINAL, res, pixels="imagenet")
    table = original(len(heads))
    return options, rules.read(with_biases(theirs, "attn.qkv"), table, heads_by_stage(heads), "Swin", _CLASSIFIER)


def read_timm(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any]):
    """(options, parameters) of a timm SwinTransformer, without its classifier.

    Raises:
      UserError: it is another model, or of a form that ours has not.
    """
    arguments = dict(config.get("model_args") or {})
    for key, value in arguments.items():
        if not re.fullmatch(_UNUSED, key) and value and (key, value) != ("in_chans", 3) and key != "global_pool":
            raise UserError(f"timm's model_args have {key}={value!r}, which isn't known here.")
    pooling = arguments.get("global_pool", config.get("global_pool", "avg"))
    if pooling not in ("avg", ""):
        raise UserError(f"The timm Swin has global_pool={pooling!r}; known is 'avg'.")
    size = arguments.get("img_size") or (config.get("pretrained_cfg") or {}).get("input_size") or (3, 224, 224)
    sides = [size] if isinstance(size, int) else list(size)[-2:]
    if len(set(sides)) > 1:
        raise UserError(f"The timm Swin reads images of {sides}; known are squares.")
    theirs = without_buffers(theirs)
    options, heads = options_of(theirs, ORIGINAL, sides[0])
    table = original(len(heads), merge_at=1)
    theirs = with_biases(theirs, "attn.qkv")
    return options, rules.read(theirs, table, heads_by_stage(heads), "timm Swin", _TIMM_CLASSIFIER)


def write_timm(options: ImageOptions, params: Mapping[str, np.ndarray]):
    """(state dict, config.json) of the encoder as a timm SwinTransformer: `timm.create_model("local-dir:FOLDER")`.

    Raises:
      UserError: the encoder is not one of timm's form.
    """
    check_form(options, dict(activation="gelu", eps=EPS) | FORM, "timm Swin", kind="Swin")
    kind = options.encoder_kind
    mean, std = PIXELS[options.pixels]
    arguments = {
        "img_size": options.res,
        "patch_size": kind.patch,
        "embed_dim": kind.sizes[0].width,
        "depths": [size.depth for size in kind.sizes],
        "num_heads": [size.heads for size in kind.sizes],
        "window_size": options.window,
        "num_classes": 0,
    }
    config = {
        "architecture": "swin_base_patch4_window7_224",
        "num_classes": 0,
        "num_features": kind.size.width,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, options.res, options.res],
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        },
    }
    return rules.write(_tower(params), original(len(kind.sizes), merge_at=1), "timm Swin"), config


def with_biases(theirs: Mapping[str, np.ndarray], projection: str) -> dict[str, np.ndarray]:
    """Their arrays with zeros for the biases of projections that have none, which is the same."""
    zeros = {
        name.removesuffix("weight") + "bias": np.zeros(len(value), np.float32)
        for name, value in theirs.items()
        if name.endswith(f"{projection}.weight")
    }
    return zeros | dict(theirs)


def _tower(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in params.items() if name.startswith("encoder/")}


# What transformers leaves out of config.json where it has its default.
_DEFAULTS = dict(image_size=224, window_size=7, hidden_act="gelu", layer_norm_eps=EPS, mlp_ratio=4.0)
_REQUIRED = dict(num_channels=3, use_absolute_embeddings=False, mlp_ratio=4.0, layer_norm_eps=EPS)
# Names since transformers 5 -> those on the hub.
_NEW = (
    (r"\.attention\.([qkv])_proj\.", lambda m: f".attention.self.{dict(q='query', k='key', v='value')[m[1]]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^swin\.", ""),
)


def read_hugging_face(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any]):
    """(options, parameters) of a SwinModel or SwinForImageClassification, without its classifier.

    Raises:
      UserError: it is another model, or of a form that ours has not.
    """
    config = _DEFAULTS | dict(config)
    for name, value in _REQUIRED.items():
        if config.get(name, value) != value:
            raise UserError(f"config.json has {name}={config[name]!r}; Swins are read with {value!r} only.")
    renamed = {}
    for name, value in without_buffers(theirs).items():
        for pattern, new in _NEW:
            name = re.sub(pattern, new, name)
        renamed[name] = value
    renamed.pop("embeddings.mask_token", None)  # Of the pre-training task.
    for part in ("query", "key", "value"):
        renamed = with_biases(renamed, f"attention.self.{part}")
    options, heads = options_of(
        renamed, HUGGING_FACE, config["image_size"], activation=activation(config["hidden_act"])
    )
    table = hugging_face(len(heads))
    return options, rules.read(renamed, table, heads_by_stage(heads), "Swin", ("classifier.weight", "classifier.bias"))


def write_hugging_face(options: ImageOptions, params: Mapping[str, np.ndarray]):
    """(state dict, config) of the encoder as a SwinModel.

    Raises:
      UserError: the encoder is not one of its form.
    """
    check_form(options, dict(eps=EPS) | FORM, "transformers' Swin", kind="Swin")
    kind = options.encoder_kind
    windows = kind.windows(options)
    if set(windows) != {options.window}:
        raise UserError(f"A transformers' Swin has one window for all stages; this model has {windows}.")
    config = {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "image_size": options.res,
        "patch_size": kind.patch,
        "num_channels": 3,
        "embed_dim": kind.sizes[0].width,
        "depths": [size.depth for size in kind.sizes],
        "num_heads": [size.heads for size in kind.sizes],
        "window_size": options.window,
        "mlp_ratio": 4.0,
        "hidden_act": their_activation(options.activation),
        "layer_norm_eps": options.eps,
    }
    return rules.write(_tower(params), hugging_face(len(kind.sizes)), "transformers' Swin"), config


def fits(options: Any) -> bool:
    """Whether a model's image tower is a Swin, which is then written alone."""
    return Ability.IMAGES in abilities(options) and isinstance(options.encoder_kind, SwinKind)


def read(source: Source) -> Weights:
    """A Swin of transformers with the pixels of its processor."""
    options, params = read_hugging_face(source.arrays, source.config)
    return assemble_folder(source, options, params, "ViT")


def write(weights: Weights, target: Target) -> None:
    """Writes a folder for SwinModel.

    Raises:
      UserError: the model has a text tower too, or its image tower is of another form.
    """
    if Ability.TEXTS in abilities(weights.options):
        raise UserError("Hugging Face has no two towers of which one is a Swin.")
    write_files(weights, target, *write_hugging_face(weights.options, weights.params))
