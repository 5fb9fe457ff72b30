"""The official GLIP's names (github.com/microsoft/GLIP) of its head: tables of rules."""

import numpy as np

from capvl.convert import bert, rules
from capvl.convert.rules import CONV, KV, OUT, Layout, Q, Rule


def _heads(ours: str, layout: Layout, *theirs: str) -> list[Rule]:
    """Projections to heads, fused in ours."""
    return [
        Rule(f"{ours}/{leaf}", tuple(f"{name}.{suffix}" for name in theirs), layout)
        for leaf, suffix in (("kernel", "weight"), ("bias", "bias"))
    ]


def _out(ours: str, theirs: str) -> list[Rule]:
    """The Linear behind heads."""
    return [Rule(f"{ours}/kernel", (f"{theirs}.weight",), OUT), Rule(f"{ours}/bias", (f"{theirs}.bias",))]


def deep_fusion(ours: str, theirs: str) -> list[Rule]:
    """`capvl.models.deep_fusion.DeepFusion` of all levels at once: their bidirectional attention block.

    Args:
      ours: such as "tower/blocks/{i}/fusion".
      theirs: of the block, such as "b_attn".
    """
    return [
        *rules.norm(f"{ours}/norm_image", f"{theirs}.layer_norm_v"),
        *rules.norm(f"{ours}/norm_text", f"{theirs}.layer_norm_l"),
        *_heads(f"{ours}/image_qv", KV, f"{theirs}.attn.v_proj", f"{theirs}.attn.values_v_proj"),
        *_heads(f"{ours}/text_kv", KV, f"{theirs}.attn.l_proj", f"{theirs}.attn.values_l_proj"),
        *_out(f"{ours}/image_out", f"{theirs}.attn.out_v_proj"),
        *_out(f"{ours}/text_out", f"{theirs}.attn.out_l_proj"),
        Rule(f"{ours}/image_gate", (f"{theirs}.gamma_v",)),
        Rule(f"{ours}/text_gate", (f"{theirs}.gamma_l",)),
    ]


def separate_fusion(ours: str, theirs: str) -> list[Rule]:
    """`DeepFusion` of each level by itself."""
    return [
        *deep_fusion(ours, theirs),
        *rules.dense(f"{ours}/join", f"{theirs}.shrink_lang.fc"),
        *rules.norm(f"{ours}/join_norm", f"{theirs}.shrink_lang.layer_norm"),
    ]


def fusion_to_image(ours: str, theirs: str) -> list[Rule]:
    """`capvl.models.deep_fusion.FusionToImage`; `theirs` such as "t2i_attn"."""
    return [
        *rules.norm(f"{ours}/norm_image", f"{theirs}.layer_norm_q_1"),
        *rules.norm(f"{ours}/norm_text", f"{theirs}.layer_norm_k_1"),
        *_heads(f"{ours}/image_q", Q, f"{theirs}.attn.q_proj"),
        *_heads(f"{ours}/text_kv", KV, f"{theirs}.attn.k_proj", f"{theirs}.attn.v_proj"),
        *_out(f"{ours}/image_out", f"{theirs}.attn.out_proj"),
        Rule(f"{ours}/image_gate", (f"{theirs}.gamma",)),
    ]


NOT_OF_OURS = ("cls_logits.",)
"""Beginnings of names in their head that give a loss which is multiplied by 0."""


def alignment(ours: str, theirs: str, levels: int) -> list[Rule]:
    """`capvl.models.alignment.AlignmentHead`; `theirs` such as "rpn.head"."""
    return [
        *rules.dense(f"{ours}/project", f"{theirs}.dot_product_projection_text"),
        Rule(f"{ours}/log_scale", (f"{theirs}.log_scale",)),
        Rule(f"{ours}/bias_text", (f"{theirs}.bias_lang",)),
        Rule(f"{ours}/bias", (f"{theirs}.bias0",)),
        *_pointwise(f"{ours}/box", f"{theirs}.bbox_pred"),
        Rule(f"{ours}/box_scale", tuple(f"{theirs}.scales.{level}.scale" for level in range(levels)), _JOINED),
        *_pointwise(f"{ours}/centerness", f"{theirs}.centerness"),
    ]


def _pointwise(ours: str, theirs: str) -> list[Rule]:
    """A convolution of 1x1, which is a Dense."""
    return [Rule(f"{ours}/kernel", (f"{theirs}.weight",), _POINTWISE), Rule(f"{ours}/bias", (f"{theirs}.bias",))]


_POINTWISE = Layout(lambda theirs, heads: theirs[0][..., 0, 0].T, lambda ours: [ours.T[..., None, None]])
_JOINED = Layout(lambda theirs, heads: np.concatenate(theirs), lambda ours: list(ours[:, None]))


def dyhead(ours: str, theirs: str) -> list[Rule]:
    """`capvl.models.dyhead.DyHeadBlock` as all published models have it; `theirs` such as "dyhead_tower.2"."""
    table = []
    for number, candidate in enumerate(("coarser", "same", "finer")):
        table += convolution(f"{ours}/{candidate}/conv", f"{theirs}.DyConv.{number}.conv")
        table += rules.norm(f"{ours}/{candidate}/norm", f"{theirs}.DyConv.{number}.bn")
    return [
        *table,
        *convolution(f"{ours}/steering", f"{theirs}.offset"),
        *_pointwise(f"{ours}/scale", f"{theirs}.AttnConv.1"),
        *rules.dense(f"{ours}/task/down", f"{theirs}.relu.fc.0"),
        Rule(f"{ours}/task/up/kernel", (f"{theirs}.relu.fc.2.weight",), _COEFFICIENTS),
        Rule(f"{ours}/task/up/bias", (f"{theirs}.relu.fc.2.bias",), _COEFFICIENTS),
    ]


def convolution(ours: str, theirs: str) -> list[Rule]:
    """A convolution with its bias."""
    return [Rule(f"{ours}/kernel", (f"{theirs}.weight",), CONV), Rule(f"{ours}/bias", (f"{theirs}.bias",))]


_COEFFICIENTS = Layout(
    lambda theirs, heads: theirs[0].T.reshape(*theirs[0].T.shape[:-1], 4, -1),
    lambda ours: [ours.reshape(*ours.shape[:-2], -1).T],
)
"""Four coefficients a channel."""

_FUSIONS = {
    "both": (deep_fusion, "b_attn"),
    "separate": (separate_fusion, "b_attn"),
    "to_image": (fusion_to_image, "t2i_attn"),
}


def tower(ours: str, theirs: str, blocks: int, fusion: str) -> list[Rule]:
    """`capvl.models.tower.DetectionTower`: the parts of a block are modules of one list in theirs.

    Args:
      ours: such as "tower".
      theirs: such as "rpn.head.dyhead_tower".
      blocks, fusion: as of the tower.
    """
    block, module = f"{ours}/blocks/{{i}}", f"{theirs}.{{i}}"
    if fusion == "none":
        return rules.of_layers(dyhead(f"{block}/dyhead", module), range(blocks))
    fuse, name = _FUSIONS[fusion]
    return [
        *rules.of_layers(fuse(f"{block}/fusion", f"{module}.{name}"), range(0, 3 * blocks, 3)),
        *rules.of_layers(bert.layer(f"{block}/text", module), range(1, 3 * blocks, 3)),
        *rules.of_layers(dyhead(f"{block}/dyhead", module), range(2, 3 * blocks, 3)),
    ]
