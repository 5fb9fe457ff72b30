"""ViT sizes by name, as in "Scaling Vision Transformers" (table 2) and SoViT (So400m)."""

import dataclasses
import re

from capvl.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Size:
    """Width D, depth, MLP width M and heads H of a transformer."""

    width: int
    depth: int
    mlp: int
    heads: int


SIZES = {
    "mu": Size(32, 1, 128, 2),
    "nano": Size(128, 6, 512, 4),
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "M": Size(512, 12, 2048, 8),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "So400m": Size(1152, 27, 4304, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
    "G": Size(1664, 48, 8192, 16),
    "e": Size(1792, 56, 15360, 16),
}


def parse(name: str) -> tuple[Size, int]:
    """Size and patch of a variant: "L/16" -> (SIZES["L"], 16); "w96d4h3m384/8" spells a size out.

    Raises:
      UserError: the name is not SIZE/PATCH or the size is unknown.
    """
    match = re.fullmatch(r"([A-Za-z0-9]+)/(\d+)", name)
    if not match or int(match[2]) == 0:
        raise UserError(f"Model {name!r} should read SIZE/PATCH, such as 'L/16'.")
    return parse_size(match[1]), int(match[2])


def parse_size(name: str) -> Size:
    """The size of a name in SIZES, or spelled out as "w96d4h3m384" (width, depth, heads, MLP).

    Raises:
      UserError: it is neither.
    """
    custom = re.fullmatch(r"w(\d+)d(\d+)h(\d+)m(\d+)", name)
    if custom:
        width, depth, heads, mlp = map(int, custom.groups())
        if not (width and depth and heads and mlp) or width % heads:
            raise UserError(f"Model size {name!r}: the width must be a multiple of the heads, and none may be 0.")
        return Size(width, depth, mlp, heads)
    if name not in SIZES:
        raise UserError(f"Unknown model size {name!r}." + nearest(name, SIZES))
    return SIZES[name]
