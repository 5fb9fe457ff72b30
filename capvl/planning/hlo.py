"""Reads an optimised HLO program, as `compiled.as_text()` gives it: its computations and their instructions."""

import dataclasses
import math
import re

import numpy as np


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: dtype, extents, and whether it lives in HBM (memory space 0)."""

    dtype: str
    extents: tuple[int, ...]
    hbm: bool

    @property
    def bytes(self) -> int:
        """Size without the layout's padding."""
        if self.dtype in ("token", "opaque"):
            return 0
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.extents) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    shape: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """(computations by name, name of the entry)."""
    computations, current, entry = {}, None, ""
    # Neither comments nor kernels' metadata, which spans lines, say anything that is counted here.
    for line in re.sub(r"/\*.*?\*/|(?<=kernel_metadata=\{)\n.*\n(?=\})", "", text).splitlines():
        if line.endswith("{") and not line.startswith(" ") and "(" in line:
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            current = computations[name] = {}
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _balanced(rest) if rest.startswith("(") else re.match(r"\w+\[[^\]]*\](?:\{[^}]*\})?", rest).end()
    shape, rest = _shape(rest[:end]), rest[end:].lstrip()
    opcode, paren, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _balanced(rest) if paren else 0
    inside, attributes = rest[1 : end - 1], rest[end:]
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(found[2], shape, opcode.strip(), operands, attributes, inside, bool(found[1]))


def _balanced(text: str) -> int:
    """Where the parenthesis that opens `text` is closed, plus one."""
    depth = 0
    for at, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return at + 1
    return len(text)


def _shape(text: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, extents, layout in re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", text):
        sizes = tuple(int(n.lstrip("<=")) for n in extents.split(",") if n)
        space = re.search(r"S\((\d+)\)", layout)
        arrays.append(Array(dtype, sizes, not space or space[1] == "0"))
    return tuple(arrays)


def replica_groups(attributes: str) -> list[tuple[int, ...]]:
    """The groups of a collective in any of HLO's spellings; [] where it names none."""
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes):
        return [tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d, ]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, order = ([int(n) for n in found[k].split(",")] for k in (1, 2))
        ids = np.arange(math.prod(order)).reshape(order)
        if found[3]:
            ids = ids.transpose([int(n) for n in found[3].split(",")])
        return [tuple(row) for row in ids.reshape(shape).tolist()]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        axes = {n: int(k) for n, k in re.findall(r"'(\w+)'=(\d+)", found[1])}
        chosen = re.findall(r"'(\w+)'", found[2])
        ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        names = list(axes)
        order = [names.index(n) for n in names if n not in chosen] + [names.index(n) for n in chosen]
        width = math.prod(axes[n] for n in chosen)
        return [tuple(row) for row in ids.transpose(order).reshape(-1, width).tolist()]
    if found := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", attributes):
        return [tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d, ]+)\}", found[1])]
    return []
