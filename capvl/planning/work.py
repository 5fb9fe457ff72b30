"""Counts an optimised HLO program's work: matmul FLOPs, bytes and collectives, loops as often as they run.

XLA's own `cost_analysis` counts the body of a loop once. Here each while loop is counted as
often as its condition says (counter < constant), and a loop of unknown length as often as the
nearest `at_most_N_times` scope around it promises.
"""

import collections
import dataclasses
import math
import re

from capvl.planning import hlo
from capvl.planning.hlo import Array, Instruction

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "copy-done",
    "slice-done",
    "opt-barrier",
    "optimization-barrier",
    "domain",
}
# Matmuls of (tokens, tokens, head width) in JAX's splash attention, forward and (scores again) backward.
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
NOTHING_MOVES = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")


@dataclasses.dataclass
class Cost:
    """Work of a program on one chip.

    Attributes:
      flops: of matmuls and convolutions, a multiply-add counting as two.
      bytes: read and written by all operations, as XLA counts them.
      hbm_bytes: the part of them in HBM.
      cycles: the compiler's own estimates, where it gives any.
      collectives: (kind, bytes a chip, chips in a group, whether groups cross slices) -> times.
      by_operation: HBM bytes by what the program calls the operation.
    """

    flops: float = 0.0
    bytes: float = 0.0
    hbm_bytes: float = 0.0
    cycles: float = 0.0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    by_operation: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Cost", times: float = 1) -> None:
        """Adds another cost so many times."""
        for field in ("flops", "bytes", "hbm_bytes", "cycles"):
            setattr(self, field, getattr(self, field) + times * getattr(other, field))
        for counter in ("collectives", "by_operation"):
            for key, value in getattr(other, counter).items():
                getattr(self, counter)[key] += times * value


class Program:
    """A parsed HLO module, as `compiled.as_text()` gives it.

    Attributes:
      cost: the whole program's work on one chip.
      loops: (name of the body, times it runs) of each while loop.
    """

    def __init__(self, text: str, chips_a_slice: int = 0, slices: int = 1):
        """Counts a program.

        Args:
          text: of the optimised module.
          chips_a_slice: to tell which groups of chips cross slices; 0 for one slice.
          slices: that transfers through the hosts connect.
        """
        self._slice, self._slices = chips_a_slice, slices
        self._computations, self._entry = hlo.parse(text)
        self._done: dict[str, Cost] = {}
        self.loops: list[tuple[str, int]] = []
        self.cost = self._computation(self._entry)

    def _computation(self, name: str) -> Cost:
        if name not in self._done:
            total, known = Cost(), self._computations[name]
            for instruction in known.values():
                self._add(total, instruction, known)
            self._done[name] = total
        return self._done[name]

    def _add(self, total: Cost, i: Instruction, known: dict[str, Instruction]) -> None:
        if i.opcode == "while":
            times = self._trips(i)
            body = i.attribute(r"body=%?([\w.\-]+)")
            self.loops.append((body, times))
            total.add(self._computation(body), times)
            return
        if i.opcode in ("call", "async-start"):
            total.add(self._computation(i.attribute(r"(?:to_apply|calls|called_computations)=\{?%?([\w.\-]+)")))
            return
        if i.opcode == "conditional":
            names = i.attribute(r"branch_computations=\{([^}]*)\}") or ",".join(
                re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", i.attributes)
            )
            total.add(max((self._computation(n.strip().lstrip("%")) for n in names.split(",")), key=lambda c: c.bytes))
            return
        kind = next((c for c in COLLECTIVES if i.opcode in (c, f"{c}-start")), None)
        if kind:
            moved = _largest(i, known)
            size, crosses = self._group(i)
            total.collectives[kind, moved, size, crosses] += 1
        if i.opcode == "send" and (kind := i.attribute(r'_xla_megascale_transfer_type="(\w+)"')):
            # Between slices the TPU compiler makes of a collective a transfer through the hosts.
            moved = known[i.operands[0]].shape[0].bytes
            total.collectives[kind.lower().replace("_", "-"), moved, self._slices, True] += 1
        if i.opcode in FREE or i.opcode.endswith("-done") or i.attribute(rf'target="({"|".join(NOTHING_MOVES)})"'):
            return
        total.flops += self._flops(i, known)
        moved, in_hbm = self._moved(i, known)
        total.bytes += moved
        total.hbm_bytes += in_hbm
        total.cycles += float(i.attribute(r'estimated_cycles":"(\d+)"') or 0)
        total.by_operation[_operation(i)] += in_hbm

    def _trips(self, i: Instruction) -> int:
        """How often a loop runs: known_trip_count, the bound of its condition, or an at_most scope."""
        if known := i.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self._computations[i.attribute(r"condition=%?([\w.\-]+)")]
        root = next(c for c in condition.values() if c.root)
        bounds = [int(condition[o].literal) for o in root.operands if condition[o].opcode == "constant"]
        counters = [condition[o] for o in root.operands if condition[o].opcode == "get-tuple-element"]
        if root.opcode == "fusion":
            inner = self._computations[root.attribute(r"calls=%?([\w.\-]+)")].values()
            bounds += [int(c.literal) for c in inner if c.opcode == "constant" and c.literal.isdigit()]
        if bounds and counters:
            return -(-bounds[0] // self._increment(i, int(counters[0].attribute(r"index=(\d+)"))))
        promised = re.findall(r"at_most_(\d+)_times", i.attributes)
        return int(promised[-1]) if promised else 1

    def _increment(self, loop: Instruction, index: int) -> int:
        """By how much a loop's body raises its counter, element `index` of what it carries; 1 where it isn't plain."""
        body = self._computations[loop.attribute(r"body=%?([\w.\-]+)")]
        root = next(c for c in body.values() if c.root)
        raised = body.get(root.operands[index]) if root.opcode == "tuple" else None
        if raised is None or raised.opcode != "add":
            return 1
        steps = [int(body[o].literal) for o in raised.operands if body[o].opcode == "constant"]
        return steps[0] if steps else 1

    def _group(self, i: Instruction) -> tuple[int, bool]:
        """(chips in a group, whether a group crosses slices) of a collective."""
        groups = hlo.replica_groups(i.attributes)
        if not groups:
            return 0, False
        crosses = bool(self._slice) and any(len({c // self._slice for c in g}) > 1 for g in groups)
        return max(map(len, groups)), crosses

    def _flops(self, i: Instruction, known: dict[str, Instruction]) -> float:
        if i.opcode == "fusion":
            inner = self._computations[i.attribute(r"calls=%?([\w.\-]+)")]
            return sum(self._flops(c, inner) for c in inner.values())
        if i.opcode == "dot":
            left = known[i.operands[0]].shape[0].extents
            contracted = [int(d) for d in (i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",") if d]
            return 2.0 * math.prod(i.shape[0].extents) * math.prod(left[d] for d in contracted)
        if i.opcode == "convolution":
            return _convolution_flops(i, known)
        if i.opcode == "custom-call":
            return _kernel_flops(i, known)
        return 0.0

    def _moved(self, i: Instruction, known: dict[str, Instruction]) -> tuple[float, float]:
        """(bytes, bytes in HBM) that one operation reads and writes."""
        operands = [known[o].shape for o in i.operands]
        if i.opcode in ("copy-start", "slice-start"):
            source = operands[0][0]
            part = min(source.bytes, i.shape[1].bytes) if len(i.shape) > 1 else source.bytes
            ends = [source.hbm, i.shape[1].hbm if len(i.shape) > 1 else True]
            return 2.0 * part, float(part * sum(ends))
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return _ends([i.shape[0], dataclasses.replace(operands[0][0], **_as(i.shape[0]))])
        if i.opcode in ("dynamic-update-slice", "scatter"):
            update = operands[1 if i.opcode == "dynamic-update-slice" else 2][0]
            return _ends([update, dataclasses.replace(i.shape[0], **_as(update))])
        if i.opcode == "fusion":
            return self._fusion_moved(i, operands)
        if any(i.opcode in (c, f"{c}-start") for c in COLLECTIVES):
            return _ends([a for shape in operands for a in shape] * 2)
        return _ends([*i.shape, *(a for shape in operands for a in shape)])

    def _fusion_moved(self, i: Instruction, operands) -> tuple[float, float]:
        """A fused slice reads, and a fused update writes, only its part of an operand."""
        inner = self._computations[i.attribute(r"calls=%?([\w.\-]+)")]
        arrays = []
        for number, shape in enumerate(operands):
            arrays += self._read(inner, number, shape)
        root = next(c for c in inner.values() if c.root)
        roots = [inner[o] for o in root.operands] if root.opcode == "tuple" else [root]
        for output, written in zip(roots, i.shape, strict=False):
            while output.opcode == "bitcast":
                output = inner[output.operands[0]]
            if output.opcode == "dynamic-update-slice":
                written = dataclasses.replace(written, **_as(inner[output.operands[1]].shape[0]))
            arrays.append(written)
        return _ends(arrays)

    def _read(self, inner: dict[str, Instruction], number: int, shape) -> list[Array]:
        """What a fused computation reads of its operand `number`: slices only where every user takes slices."""
        parameter = next(c for c in inner.values() if c.opcode == "parameter" and int(c.literal) == number)
        parts, pending = [], [parameter]
        while pending:
            name = pending.pop().name
            for user in inner.values():
                if name not in user.operands:
                    continue
                if user.opcode == "bitcast":
                    pending.append(user)
                elif user.opcode in ("dynamic-slice", "slice"):
                    parts.append(dataclasses.replace(shape[0], **_as(user.shape[0])))
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    continue  # Updated in place.
                elif user.opcode == "fusion":
                    nested = self._computations[user.attribute(r"calls=%?([\w.\-]+)")]
                    for position in (n for n, operand in enumerate(user.operands) if operand == name):
                        parts += self._read(nested, position, shape)
                else:
                    return list(shape)
        whole = sum(a.bytes for a in shape)
        return parts if sum(a.bytes for a in parts) <= whole else list(shape)


def _as(array: Array) -> dict:
    return {"dtype": array.dtype, "extents": array.extents}


def _ends(arrays) -> tuple[float, float]:
    return float(sum(a.bytes for a in arrays)), float(sum(a.bytes for a in arrays if a.hbm))


def _largest(i: Instruction, known) -> int:
    """Bytes of a collective: the larger of what goes in and what comes out, on one chip."""
    inside = sum(a.bytes for o in i.operands for a in known[o].shape)
    if i.opcode.startswith("all-gather") or i.opcode.startswith("reduce-scatter"):
        out = i.shape[len(i.operands) :] if i.opcode.endswith("-start") else i.shape
        return max(inside, sum(a.bytes for a in out))
    return inside


def _operation(i: Instruction) -> str:
    """What the program calls an operation: the last scopes of its op_name, forward or backward."""
    name = i.attribute(r'op_name="([^"]*)"') or ""
    if not name:
        return f"({i.opcode.removesuffix('-start')})"
    direction = "backward" if "transpose(" in name else "forward"
    skip = re.compile(r"jit\(.*|jvp\(.*|transpose\(.*|while|body|closed_call|checkpoint|rematted_computation|\)+")
    scopes = [s for s in name.split("/") if s and not skip.fullmatch(s)]
    return f"{'/'.join(scopes[-2:]) or i.opcode}, {direction}"


def _kernel_flops(i: Instruction, known) -> float:
    """What a kernel says of itself, or what is known of its name."""
    if work := i.attribute(r'"flops":"?(\d+)'):
        return float(work)
    matmuls = next((n for name, n in KERNELS.items() if i.name.startswith(name)), 0)
    if not matmuls:
        return 0.0
    queries, keys = [s.extents for o in i.operands for s in known[o].shape if len(s.extents) == 4][:2]
    return 2.0 * matmuls * math.prod(queries) * keys[2]


def _convolution_flops(i: Instruction, known) -> float:
    """2 * output batch and features * input features * pairs of output and kernel positions that meet."""
    left, right = known[i.operands[0]].shape[0].extents, known[i.operands[1]].shape[0].extents
    labels = i.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    inputs, rest = labels.split("_")
    kernel, outputs = rest.split("->")
    out = i.shape[0].extents
    spatial = sum(c.isdigit() for c in outputs)

    def window(key, default):
        value = i.attribute(rf"{key}=([\dx_\-]+)")
        return value.split("x") if value else [default] * spatial

    pad = [tuple(map(int, p.split("_"))) for p in window("pad", "0_0")]
    stride, lhs, rhs = ([int(n) for n in window(k, "1")] for k in (r"\bstride", "lhs_dilate", "rhs_dilate"))
    pairs = 1
    for d in range(spatial):
        size, taps, outs = left[inputs.index(str(d))], right[kernel.index(str(d))], out[outputs.index(str(d))]
        pairs *= _meetings(size, taps, outs, pad[d][0], stride[d], lhs[d], rhs[d])
    batch, features = out[outputs.index("b")], out[outputs.index("f")]
    return 2.0 * batch * features * right[kernel.index("i")] * pairs


def _meetings(size: int, taps: int, outs: int, pad: int, stride: int, lhs: int, rhs: int) -> int:
    """Pairs (output, tap) of one dimension that touch a real input element."""
    reach, count = (size - 1) * lhs, 0
    for tap in range(taps):
        for o in range(outs) if lhs > 1 or outs < 4096 else ():
            at = o * stride + tap * rhs - pad
            count += 0 <= at <= reach and at % lhs == 0
        if lhs == 1 and outs >= 4096:
            first, last = -(-(pad - tap * rhs) // stride), (reach + pad - tap * rhs) // stride
            count += max(0, min(last, outs - 1) - max(first, 0) + 1)
    return count
