"""What chips can do: peak rates, memory and links, from the vendors' data sheets.

Network figures of TPUs (one link, one way; data-centre network a chip) are those of "How to
Scale Your Model" (jax-ml.github.io/scaling-book, part 2).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      name: as users call it.
      kinds: beginnings of JAX's `device_kind`.
      flops: dense bfloat16 FLOP/s.
      hbm_bytes: memory that a program can use.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one chip-to-chip link, one way; 0 where unknown.
      links: dimensions of the torus that the links make.
      dcn_bandwidth: bytes/s a chip between slices; 0 where unknown.
      chips_a_host, cores_a_host: chips, and vCPUs, of one host; 0 where it depends.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm_bytes: float = 0.0
    hbm_bandwidth: float = 0.0
    link_bandwidth: float = 0.0
    links: int = 0
    dcn_bandwidth: float = 0.0
    chips_a_host: int = 0
    cores_a_host: int = 0


GIB = 2.0**30

CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 31.75 * GIB, 1228e9, 45e9, 3, 6.25e9, 4, 240),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 45e9, 2, 3.125e9, 8, 224),
    Chip("v5p", ("TPU v5p", "TPU v5"), 459e12, 95.74 * GIB, 2765e9, 90e9, 3, 6.25e9, 4, 208),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1640e9, 90e9, 2, 12.5e9, 8, 180),
    Chip("A100", ("NVIDIA A100",), 312e12, 80e9, 2039e9),
    Chip("H100", ("NVIDIA H100",), 989e12, 80e9, 3350e9),
    Chip("H200", ("NVIDIA H200",), 989e12, 141e9, 4800e9),
)


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a `device_kind`, the longest known beginning winning; None if unknown."""
    known = [(kind, chip) for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)]
    return max(known, key=lambda pair: len(pair[0]))[1] if known else None


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device; None if unknown."""
    chip = of_kind(device_kind)
    return chip.flops if chip else None
