"""Two-way rules between our parameters and those of PyTorch models.

A rule names one of our parameters, the arrays of theirs that it is made of, and how. `{i}` in the
names stands for a layer: ours has the layers of a stack in one. Every rule can be read in both directions
without loss, so a model's table is written once.

PyTorch's Linear has its kernel as (out, in), its convolution as (out, in, height, width).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from capvl.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays of theirs become one of ours, and back.

    Attributes:
      read: (their arrays, heads) -> ours.
      write: ours -> their arrays.
    """

    read: Callable[[Sequence[np.ndarray], int], np.ndarray]
    write: Callable[[np.ndarray], Sequence[np.ndarray]]


def _split_heads(kernel: np.ndarray, heads: int) -> np.ndarray:
    """(H K, D) -> (D, H, K), or a bias (H K,) -> (H, K)."""
    return kernel.T.reshape(*kernel.T.shape[:-1], heads, -1)


def _join_heads(kernel: np.ndarray) -> np.ndarray:
    return kernel.reshape(*kernel.shape[:-2], -1).T


def _fused(parts: int, packed: bool) -> Layout:
    """Projections to heads, side by side in ours: kernel (D, parts, H, K), bias (parts, H, K)."""

    def read(theirs, heads):
        split = np.split(theirs[0], parts) if packed else theirs
        return np.stack([_split_heads(x, heads) for x in split], axis=-3)

    def write(ours):
        split = [_join_heads(np.take(ours, i, axis=-3)) for i in range(ours.shape[-3])]
        return [np.concatenate(split)] if packed else split

    return Layout(read, write)


COPY = Layout(lambda theirs, heads: theirs[0], lambda ours: [ours])
SCALAR = Layout(lambda theirs, heads: theirs[0].reshape(1), lambda ours: [ours])
ROW = Layout(lambda theirs, heads: theirs[0].reshape(1, -1), lambda ours: [ours[0]])
ROW3 = Layout(lambda theirs, heads: theirs[0].reshape(1, -1), lambda ours: [ours[None]])
TABLE3 = Layout(lambda theirs, heads: theirs[0][0], lambda ours: [ours[None]])
LINEAR = Layout(lambda theirs, heads: theirs[0].T, lambda ours: [ours.T])
CONV = Layout(lambda theirs, heads: theirs[0].transpose(2, 3, 1, 0), lambda ours: [ours.transpose(3, 2, 0, 1)])
OUT = Layout(
    lambda theirs, heads: theirs[0].T.reshape(heads, -1, theirs[0].shape[0]),
    lambda ours: [ours.reshape(-1, ours.shape[-1]).T],
)
QKV, KV, Q = _fused(3, False), _fused(2, False), _fused(1, False)
PACKED_QKV, PACKED_KV = _fused(3, True), _fused(2, True)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our parameters, theirs, and the layout; see the module.

    Attributes:
      layers: numbers that the layers of our stack have in theirs; None where it is all of them.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = COPY
    layers: Sequence[int] | None = None


def dense(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
    """A Linear."""
    rules = [Rule(f"{ours}/kernel", (f"{theirs}.weight",), LINEAR)]
    return rules + [Rule(f"{ours}/bias", (f"{theirs}.bias",))] if bias else rules


def norm(ours: str, theirs: str) -> list[Rule]:
    """A layer norm."""
    return [Rule(f"{ours}/scale", (f"{theirs}.weight",)), Rule(f"{ours}/bias", (f"{theirs}.bias",))]


def attention(ours: str, q: str, k: str, v: str, out: str) -> list[Rule]:
    """Self-attention whose projections are Linears of their own."""
    rules = [
        Rule(f"{ours}/qkv/{leaf}", tuple(f"{name}.{suffix}" for name in (q, k, v)), QKV)
        for leaf, suffix in (("kernel", "weight"), ("bias", "bias"))
    ]
    return [*rules, *projection(ours, out)]


def packed_attention(ours: str, weight: str, bias: str, out: str) -> list[Rule]:
    """Self-attention with one array for queries, keys and values."""
    return [
        Rule(f"{ours}/qkv/kernel", (weight,), PACKED_QKV),
        Rule(f"{ours}/qkv/bias", (bias,), PACKED_QKV),
        *projection(ours, out),
    ]


def projection(ours: str, theirs: str) -> list[Rule]:
    """The Linear behind the heads of an attention."""
    return [Rule(f"{ours}/out/kernel", (f"{theirs}.weight",), OUT), Rule(f"{ours}/out/bias", (f"{theirs}.bias",))]


def map_attention(ours: str, q: str, kv: str, out: str) -> list[Rule]:
    """A MAP head's attention: Linears for the query, and for keys and values together."""
    rules = []
    for leaf, suffix in (("kernel", "weight"), ("bias", "bias")):
        rules += [
            Rule(f"{ours}/attn/q/{leaf}", (f"{q}.{suffix}",), Q),
            Rule(f"{ours}/kv/{leaf}", (f"{kv}.{suffix}",), PACKED_KV),
        ]
    return [*rules, *projection(f"{ours}/attn", out)]


def of_layers(table: Sequence[Rule], layers: Sequence[int]) -> list[Rule]:
    """A table whose stack is of some layers of theirs, by their numbers."""
    return [dataclasses.replace(rule, layers=layers) for rule in table]


def under(ours: str, theirs: str, table: Sequence[Rule]) -> list[Rule]:
    """A table whose names begin with a prefix each, ours and theirs."""
    return [
        dataclasses.replace(rule, ours=ours + rule.ours, theirs=tuple(theirs + name for name in rule.theirs))
        for rule in table
    ]


def read(
    theirs: Mapping[str, np.ndarray], rules: Sequence[Rule], heads: Callable[[str], int], what: str, ignore=()
) -> dict[str, np.ndarray]:
    """Our parameters by path, float32.

    Args:
      theirs: a state dict.
      rules: of the model.
      heads: number of heads of one of our parameters.
      what: the model, for messages.
      ignore: endings of names that may be left over.

    Raises:
      UserError: parameters are missing or not known.
    """
    left = {name: np.asarray(value, np.float32) for name, value in theirs.items()}

    def take(name):
        if name not in left:
            raise UserError(f"The weights lack {name!r}, so they are not a whole {what}.")
        return left.pop(name)

    ours = {}
    for rule in rules:
        layers = [None]
        if "{i}" in rule.ours:
            layers = range(_depth(theirs, rule.theirs[0])) if rule.layers is None else rule.layers
        arrays = [
            rule.layout.read([take(name.replace("{i}", str(i))) for name in rule.theirs], heads(rule.ours))
            for i in layers
        ]
        ours[rule.ours.replace("/{i}", "")] = arrays[0] if layers == [None] else np.stack(arrays)
    unknown = [name for name in left if not name.endswith(tuple(ignore))] if ignore else list(left)
    if unknown:
        raise UserError(
            f"The weights have {len(unknown)} arrays that a {what} does not have: {', '.join(unknown[:5])}."
        )
    return {name: np.ascontiguousarray(value) for name, value in ours.items()}


def other_eps(text: float, image: float) -> float:
    """model.text_eps of a text tower beside an image tower: 0 where they are the same.

    Raises:
      UserError: it is 0, which means the image tower's.
    """
    if text == image:
        return 0.0
    if not text:
        raise UserError(f"The text tower's layer norms have eps=0 beside {image} of the image tower; ours can't have.")
    return text


def _depth(theirs: Mapping[str, np.ndarray], name: str) -> int:
    before, after = name.split("{i}")
    numbers = {n[len(before) : -len(after)] for n in theirs if n.startswith(before) and n.endswith(after)}
    return max(1, sum(n.isdigit() for n in numbers))  # Of none the first is missed.


def write(ours: Mapping[str, np.ndarray], rules: Sequence[Rule], what: str) -> dict[str, np.ndarray]:
    """Their state dict of our parameters.

    Raises:
      UserError: ours has parameters that theirs doesn't know, or lacks some.
    """
    left, theirs = dict(ours), {}
    for rule in rules:
        name = rule.ours.replace("/{i}", "")
        if name not in left:
            raise UserError(f"The model has no {name!r}, which a {what} needs.")
        value = np.asarray(left.pop(name), np.float32)
        layers = [("", value)]
        if "{i}" in rule.ours:
            layers = zip(range(len(value)) if rule.layers is None else rule.layers, value, strict=True)
        for i, layer in layers:
            for key, array in zip(rule.theirs, rule.layout.write(layer), strict=True):
                theirs[key.replace("{i}", str(i))] = np.asarray(array, order="C")
    if left:
        raise UserError(f"A {what} has no place for {len(left)} parameters: {', '.join(sorted(left)[:5])}.")
    return theirs
