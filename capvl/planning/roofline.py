"""The least time that a step's work needs on a chip, by what it is spent on (Williams et al. 2009)."""

import dataclasses

from capvl.chips import Chip
from capvl.planning.work import Cost


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds a step.

    Attributes:
      compute: FLOPs at the peak rate.
      hbm: bytes at the memory's bandwidth.
      ici: collectives within a slice.
      dcn: collectives between slices.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def least(self) -> float:
        """Everything overlaps: the longest of the four."""
        return max(dataclasses.astuple(self))

    @property
    def most(self) -> float:
        """Nothing overlaps: their sum."""
        return sum(dataclasses.astuple(self))

    @property
    def binds(self) -> str:
        """Which of them is the longest."""
        times = dataclasses.asdict(self)
        return max(times, key=times.get)


def collective_seconds(kind: str, moved: float, group: int, crosses: bool, chip: Chip) -> float:
    """Time of one collective on a ring, bidirectional and, where the group is larger than a ring, along all axes.

    Args:
      kind: HLO's name, such as "all-reduce".
      moved: bytes a chip: the whole array for an all-reduce and for the large side of the others.
      group: chips that take part.
      crosses: whether they belong to several slices.
      chip: whose links are used.
    """
    if group < 2:
        return 0.0
    share = (group - 1) / group
    passes = 2.0 * share if kind == "all-reduce" else 1.0 if kind == "collective-permute" else share
    if crosses:
        return passes * moved / chip.dcn_bandwidth
    rings = chip.links if group > 16 else 1
    return passes * moved / (2 * chip.link_bandwidth * rings)


def roofline(cost: Cost, chip: Chip) -> Roofline:
    """The times of a program's work."""
    network = {False: 0.0, True: 0.0}
    for (kind, moved, group, crosses), times in cost.collectives.items():
        network[crosses] += times * collective_seconds(kind, moved, group, crosses, chip)
    return Roofline(cost.flops / chip.flops, cost.hbm_bytes / chip.hbm_bandwidth, ici=network[False], dcn=network[True])
