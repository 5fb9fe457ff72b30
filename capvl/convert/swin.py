"""Swin by the names of the original code and of timm, and Hugging Face's; all in and out."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from capvl.convert import rules
from capvl.convert.rules import CONV, Rule
from capvl.errors import UserError
from capvl.models.swin import SwinKind
from capvl.models.vision import ImageOptions

# Derived from the sizes alone.
_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")
EPS = 1e-5


def original(stages: int, prefix: str = "", ours: str = "encoder/", merge: str = "layers.{}.downsample") -> list[Rule]:
    """Rules of the original names (github.com/microsoft/Swin-Transformer), which X-VLM has too.

    Args:
      stages: how many.
      prefix: before their names.
      ours: before our names.
      merge: their name of the merging behind a stage, by the stage's number.
    """
    table = [
        Rule(f"{ours}stem/kernel", (f"{prefix}patch_embed.proj.weight",), CONV),
        Rule(f"{ours}stem/bias", (f"{prefix}patch_embed.proj.bias",)),
        *rules.norm(f"{ours}stem_norm", f"{prefix}patch_embed.norm"),
        *rules.norm(f"{ours}norm", f"{prefix}norm"),
    ]
    for stage in range(stages):
        block, theirs = f"{ours}stages/{stage}/blocks/{{i}}", f"{prefix}layers.{stage}.blocks.{{i}}"
        table += [
            *rules.norm(f"{block}/norm1", f"{theirs}.norm1"),
            *rules.packed_attention(
                f"{block}/attn", f"{theirs}.attn.qkv.weight", f"{theirs}.attn.qkv.bias", f"{theirs}.attn.proj"
            ),
            Rule(f"{ours}stages/{stage}/offsets/{{i}}", (f"{theirs}.attn.relative_position_bias_table",)),
            *rules.norm(f"{block}/norm2", f"{theirs}.norm2"),
            *rules.dense(f"{block}/mlp/up", f"{theirs}.mlp.fc1"),
            *rules.dense(f"{block}/mlp/down", f"{theirs}.mlp.fc2"),
        ]
        if stage + 1 < stages:
            table += _merge(f"{ours}stages/{stage}/merge", prefix + merge.format(stage))
    return table


def _merge(ours: str, theirs: str) -> list[Rule]:
    return [
        *rules.norm(f"{ours}/norm", f"{theirs}.norm"),
        *rules.dense(f"{ours}/out", f"{theirs}.reduction", bias=False),
    ]


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
