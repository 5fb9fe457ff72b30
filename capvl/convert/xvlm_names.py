"""The official X-VLM's names (github.com/zengyan-97/X-VLM): tables of rules, ties, and the constants in its files.

Its image encoders are Swin, CLIP's ViT and DeiT; its texts go through a BERT or RoBERTa whose upper layers have
cross-attention, under one numbering.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from capvl.convert import bert, hugging_face, rules, swin, timm
from capvl.convert import roberta as _roberta
from capvl.convert.rules import CONV, KV, ROW, Q, Rule
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.swin import SwinKind
from capvl.nn.relative_positions import offset_index
from capvl.nn.windows import shift_mask

BUFFERS = ("position_ids", "relative_position_index", "attn_mask")
"""Ends of names of arrays that are no parameters."""

IMAGE = "vision_encoder."


def clip_image(theirs: str) -> list[Rule]:
    """CLIP's image tower, as Hugging Face has it but for its tables' names."""
    return [
        Rule("encoder/stem/kernel", (f"{theirs}patch_embed.weight",), CONV),
        Rule("encoder/cls", (f"{theirs}class_embedding",), ROW),
        Rule("encoder/positions", (f"{theirs}pos_embed.weight",)),
        *rules.norm("encoder/pre_norm", f"{theirs}pre_layrnorm"),
        *hugging_face.layers("encoder", theirs),
        *rules.norm("encoder/norm", f"{theirs}post_layernorm"),
    ]


def image(options: Any, theirs: str = IMAGE) -> list[Rule]:
    """The image encoder of a model with these options, whose names begin with a prefix."""
    if isinstance(options.encoder_kind, SwinKind):
        return rules.under("", theirs, swin.original(len(options.encoder_kind.sizes)))
    return clip_image(theirs) if options.pre_norm else rules.under("", theirs, timm.vit(options))


def cross_attention(ours: str, theirs: str) -> list[Rule]:
    """A layer's cross-attention as that of a block of ours (`capvl.models.fusion.FusionBlock`)."""
    table = []
    for leaf, suffix in (("kernel", "weight"), ("bias", "bias")):
        key, value, query = (f"{theirs}.self.{part}.{suffix}" for part in ("key", "value", "query"))
        table += [
            Rule(f"{ours}/cross_kv/{leaf}", (key, value), KV),
            Rule(f"{ours}/cross_attn/q/{leaf}", (query,), Q),
        ]
    table += rules.projection(f"{ours}/cross_attn", f"{theirs}.output.dense")
    return [*table, *rules.norm(f"{ours}/cross_norm", f"{theirs}.output.LayerNorm")]


def fusion_layers(ours: str, theirs: str, layers: Iterable[int], part: str = "") -> list[Rule]:
    """Layers of theirs with cross-attention as a stack of ours.

    Args:
      ours: name of the stack.
      theirs: prefix of their encoder, such as "text_encoder.bert.".
      layers: numbers of these layers.
      part: what their names have in ours behind the layer, where a layer has several parts, such as "/first".
    """
    block, layer = f"{ours}/{{i}}{part}", f"{theirs}encoder.layer.{{i}}"
    table = [*bert.layer(block, layer), *cross_attention(block, f"{layer}.crossattention")]
    return rules.of_layers(table, tuple(layers))


def text(ours: str, theirs: str, lower: int, cross: int) -> list[Rule]:
    """A text encoder and cross-modal encoder (`capvl.models.fusion.FusionBert`) without a head.

    Args:
      ours: prefix, such as "text/".
      theirs: prefix, such as "text_encoder.bert.".
      lower, cross: number of layers without cross-attention, and of those above them with.
    """
    below = bert.layer(f"{ours}blocks/{{i}}", f"{theirs}encoder.layer.{{i}}")
    return [
        *bert.embeddings(ours, f"{theirs}embeddings."),
        *rules.of_layers(below, range(lower)),
        *fusion_layers(f"{ours}cross", theirs, range(lower, lower + cross)),
    ]


def words(ours: str, theirs: str, roberta: bool) -> list[Rule]:
    """The masked-language-model head, without its output layer, which is tied.

    Args:
      ours: prefix, such as "text/".
      theirs: prefix of the whole text model, such as "text_encoder.".
      roberta: whether it is a RoBERTa.
    """
    return _roberta.words(ours, f"{theirs}lm_head.") if roberta else bert.words(ours, f"{theirs}cls.predictions.")


def head(ours: str, theirs: str) -> list[Rule]:
    """Dense, layer norm, (GELU,) Dense: `capvl.models.xvlm.Head`."""
    return [
        *rules.dense(f"{ours}/up", f"{theirs}.0"),
        *rules.norm(f"{ours}/norm", f"{theirs}.1"),
        *rules.dense(f"{ours}/down", f"{theirs}.3"),
    ]


def ties(theirs: str, roberta: bool) -> dict[str, str]:
    """Names of the output layer of a text model with a word head -> those of the arrays that it is tied to."""
    output, inner = (f"{theirs}lm_head.", "roberta.") if roberta else (f"{theirs}cls.predictions.", "bert.")
    table = f"{theirs}{inner}embeddings.word_embeddings.weight"
    return {f"{output}decoder.weight": table, f"{output}decoder.bias": f"{output}bias"}


def untied(theirs: Mapping[str, np.ndarray], tied: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The arrays without those that are tied to others.

    Raises:
      UserError: one differs from what it is tied to.
    """
    left = dict(theirs)
    for name, original in tied.items():
        if name in left and not np.array_equal(left.pop(name), left.get(original)):
            raise UserError(f"{name!r} differs from {original!r}; X-VLM has one array for both.")
    return left


def without_buffers(theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that are parameters."""
    return {name: value for name, value in theirs.items() if not name.endswith(BUFFERS)}


def position_ids(rows: int) -> np.ndarray:
    """Numbers of the rows of a table of positions, as its files have them."""
    return np.arange(rows, dtype=np.int64)[None]


def image_heads(options: Any) -> Callable[[str], int]:
    """Number of heads of the image encoder's attention by our parameter's name."""
    kind = options.encoder_kind
    if isinstance(kind, SwinKind):
        return swin.heads_by_stage([size.heads for size in kind.sizes])
    return lambda name: kind.size.heads


def image_buffers(options: Any, theirs: str = IMAGE) -> dict[str, np.ndarray]:
    """The constants of the image encoder in an official file."""
    if isinstance(options.encoder_kind, SwinKind):
        return _swin_buffers(options, theirs)
    if not options.pre_norm:
        return {}
    rows, columns = options.grid
    return {f"{theirs}position_ids": position_ids(rows * columns + 1)}


def _swin_buffers(options: Any, theirs: str) -> dict[str, np.ndarray]:
    """Rows of the tables for each query and key of a window, and the masks of windows that are shifted."""
    kind, found = options.encoder_kind, {}
    stages = zip(kind.sizes, kind.sides(options.res), kind.windows(options), strict=True)
    for stage, (size, side, window) in enumerate(stages):
        for block in range(size.depth):
            name = f"{theirs}layers.{stage}.blocks.{block}"
            index = offset_index((window, window)).astype(np.int64)
            found[f"{name}.attn.relative_position_index"] = index
            if block % 2 and side > window:
                found[f"{name}.attn_mask"] = shift_mask(window, (side, side), (window // 2,) * 2)
    return found


def swin_side(buffers: Mapping[str, np.ndarray], patch: int, theirs: str = IMAGE) -> int:
    """Side of the images of a Swin, from the number of windows that a mask is of; 0 where there is none.

    Args:
      buffers: arrays of the file.
      patch: side of a patch.
      theirs: prefix of the image encoder.
    """
    for name, mask in buffers.items():
        match = re.fullmatch(re.escape(theirs) + r"layers\.(\d+)\.blocks\.\d+\.attn_mask", name)
        if match:
            windows, places, _ = mask.shape
            return math.isqrt(windows) * math.isqrt(places) * patch * 2 ** int(match[1])
    return 0


def depth(theirs: Iterable[str], prefix: str) -> int:
    """Number of the layers whose names begin with a prefix, counted to the first that is lacking."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in theirs if name.startswith(prefix)}
    return next(i for i in range(len(numbers) + 1) if str(i) not in numbers)


def size(theirs: Mapping[str, np.ndarray], layers: str, mlp: str, heads: int) -> str:
    """Size of a stack of layers, from its shapes, for options.

    Args:
      theirs: state dict.
      layers: prefix of the layers, up to their numbers.
      mlp: of the MLP's first Linear, from the layer's number on.
      heads: of the attention; 0 for width / 64, which the released models have.

    Raises:
      UserError: there are none.
    """
    name = f"{layers}0.{mlp}.weight"
    if name not in theirs:
        raise UserError(f"The weights lack {name!r}, so they are not X-VLM's official ones.")
    hidden, width = theirs[name].shape
    heads = heads or max(1, width // 64)
    named = f"w{width}d{depth(theirs, layers)}h{heads}m{hidden}"
    sizes.parse_size(named)
    return named


def fixed(options: Any) -> dict[str, np.ndarray]:
    """Our parameters that theirs doesn't have: CLIP's convolution has no bias."""
    return {"encoder/stem/bias": np.zeros(options.encoder_width, np.float32)} if options.pre_norm else {}


def without_fixed(options: Any, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters without those.

    Raises:
      UserError: one has values.
    """
    left = dict(params)
    for name in fixed(options):
        if np.any(left.pop(name)):
            raise UserError("X-VLM's CLIP has no place for a bias of its patch convolution, which isn't zero here.")
    return left


def text_buffers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The constants of the text models in an official file: numbers of positions beside each table of them."""
    end = "position_embeddings.weight"
    return {n.replace(end, "position_ids"): position_ids(len(v)) for n, v in state.items() if n.endswith(end)}
