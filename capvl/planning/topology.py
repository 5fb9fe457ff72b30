"""TPU topologies by name, such as v5e:16x16 or v5p:4x4x4, and their devices without the chips."""

import dataclasses
import math
import re

from capvl.chips import CHIPS, Chip
from capvl.errors import UserError, nearest

FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLID = [
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "4x4x12",
    "4x4x16",
    "4x8x12",
    "8x8x8",
    "8x8x12",
    "8x8x16",
    "4x16x16",
    "8x16x16",
    "16x16x16",
    "16x16x24",
]
TPUS = {chip.name: chip for chip in CHIPS if chip.links}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one kind of TPU.

    Attributes:
      chip: what each chip can do.
      shape: extents of one slice.
      slices: how many of them, joined by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As `parse` reads it, with the slices in front where there are several."""
        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices} x {name}"

    @property
    def size(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return max(self.slices, self.size // self.chip.chips_a_host)


def known(chip: Chip) -> tuple[str, ...]:
    """Shapes that slices of a chip come in."""
    return FLAT if chip.links == 2 else tuple(SOLID)


def parse(text: str, slices: int = 1) -> Topology:
    """The topology CHIP:AxB or CHIP:AxBxC.

    Raises:
      UserError: unknown chip or shape, or fewer than one slice.
    """
    name, _, shape = text.partition(":")
    if name not in TPUS:
        raise UserError(f"Unknown chip {name!r} in topology {text!r}; known: {', '.join(TPUS)}." + nearest(name, TPUS))
    chip = TPUS[name]
    if not re.fullmatch(r"\d+(x\d+)*", shape) or shape not in known(chip):
        raise UserError(f"Topology {text!r} is unknown; {name} comes as {', '.join(known(chip))}.")
    if slices < 1:
        raise UserError(f"--slices={slices} should be at least 1.")
    return Topology(chip, tuple(int(n) for n in shape.split("x")), slices)
