"""Speed of the modulated deformable convolution, beside torchvision's compiled operator, in one run.

    taskset -c 0 python -m capvl.bench deformable --against=torchvision
    python -m capvl.bench deformable --height=100 --width=167 --dtype=bfloat16

Forward, and forward with all gradients. Both sides take turns, so that what else the machine does hits both; ratios are
of the fastest rounds. Both use all cores that the process may use: `taskset -c 0` makes it one.
"""

import argparse
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from capvl.bench.encoder import turns
from capvl.errors import UserError
from capvl.nn.deformable import modulated_deformable

ARGUMENTS = ("x", "offset", "mask", "kernel", "bias")
LAST_TO_FIRST = {4: (0, 3, 1, 2), 1: (0,)}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is convolved: maps of `height` x `width` places and `channels` channels, in and out, 3 x 3 taps."""

    batch: int = 1
    height: int = 50
    width: int = 84
    channels: int = 256
    stride: int = 1
    dtype: str = "float32"

    @property
    def places(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        return -(-self.height // self.stride), -(-self.width // self.stride)

    def flops(self) -> float:
        """Of the forward pass' products with the kernel."""
        return 2.0 * self.batch * self.places[0] * self.places[1] * 9 * self.channels**2

    def draw(self) -> tuple[list[np.ndarray], np.ndarray]:
        """ARGUMENTS with offsets of two places on average, and what the output is multiplied by for its gradients."""
        rng = np.random.default_rng(0)
        size, (rows, columns) = (self.batch, self.height, self.width, self.channels), self.places
        drawn = [
            rng.normal(size=size),
            rng.normal(scale=2.0, size=(self.batch, rows, columns, 18)),
            rng.uniform(size=(self.batch, rows, columns, 9)),
            rng.normal(scale=1 / (9 * self.channels) ** 0.5, size=(3, 3, self.channels, self.channels)),
            rng.normal(size=self.channels),
        ]
        cotangent = rng.normal(size=(self.batch, rows, columns, self.channels))
        return [array.astype(np.float32) for array in drawn], cotangent.astype(np.float32)


def ours(shape: Shape, arrays: list[np.ndarray], cotangent: np.ndarray) -> tuple[dict[str, Callable], int]:
    """Calls that give the output, and the output with all gradients; bytes that the latter needs for itself."""
    x, offset, mask, kernel, bias = map(jnp.asarray, arrays)
    args = [x.astype(shape.dtype), offset, mask, kernel.astype(shape.dtype), bias]
    weight = jnp.asarray(cotangent, shape.dtype)

    def forward(*args):
        return modulated_deformable(*args, stride=shape.stride)

    def training(*args):
        y, pull = jax.vjp(forward, *args)
        return y, *pull(weight)

    compiled = {f.__name__: jax.jit(f).lower(*args).compile() for f in (forward, training)}
    calls = {name: lambda run=run: jax.block_until_ready(run(*args)) for name, run in compiled.items()}
    return calls, compiled["training"].memory_analysis().temp_size_in_bytes


def theirs(shape: Shape, arrays: list[np.ndarray], cotangent: np.ndarray) -> dict[str, Callable]:
    """The same by torchvision, on as many threads as this process may use cores.

    Raises:
      UserError: torchvision is not installed.
    """
    try:
        # Optional, and slow to import.
        import torch
        from torchvision.ops import deform_conv2d
    except (ImportError, RuntimeError) as e:  # The latter where it was built for another PyTorch.
        raise UserError(f"--against=torchvision needs it: pip install torchvision ({e}).") from e
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    order = [
        (3, 2, 0, 1) if name == "kernel" else LAST_TO_FIRST[a.ndim] for name, a in zip(ARGUMENTS, arrays, strict=True)
    ]
    tensors = [
        torch.from_numpy(np.ascontiguousarray(array.transpose(axes))).requires_grad_()
        for array, axes in zip(arrays, order, strict=True)
    ]
    x, offset, mask, kernel, bias = tensors
    weight = torch.from_numpy(np.ascontiguousarray(cotangent.transpose(0, 3, 1, 2)))

    def run():
        return deform_conv2d(x, offset, kernel, bias, stride=shape.stride, padding=1, mask=mask)

    def forward():
        with torch.inference_mode():
            return run()

    def training():
        y = run()
        return y, *torch.autograd.grad(y, tensors, weight)

    return {"forward": forward, "training": training}


def difference(own: tuple, other: tuple) -> float:
    """The worst of outputs and gradients, as a share of the largest value."""
    worst = 0.0
    for name, found, expected in zip(("y", *ARGUMENTS), own, other, strict=True):
        expected = expected.detach().numpy()
        axes = (2, 3, 1, 0) if name == "kernel" else (0, 2, 3, 1) if expected.ndim == 4 else (0,)
        gap = np.abs(np.asarray(found, np.float32) - expected.transpose(axes)).max()
        worst = max(worst, float(gap / np.abs(expected).max()))
    return worst


def measure(shape: Shape, rounds: int, against: str) -> dict[str, float]:
    """Seconds of the forward pass and of it with all gradients, FLOP/s; with `against` also the other's.

    Raises:
      UserError: what it is measured against isn't there, can't do the dtype, or gives other numbers.
    """
    arrays, cotangent = shape.draw()
    if against and shape.dtype != "float32":
        raise UserError(f"--against={against} computes in float32 only, not in --dtype={shape.dtype}.")
    own, temporaries = ours(shape, arrays, cotangent)
    calls = {f"{name}_seconds": call for name, call in own.items()}
    if against:
        other = theirs(shape, arrays, cotangent)
        worst = difference(own["training"](), other["training"]())
        if worst > 1e-3:
            raise UserError(f"{against} gives other numbers for the same inputs, off by {worst:.2g} of the largest.")
        calls |= {f"their_{name}_seconds": call for name, call in other.items()}
    numbers = turns(calls, rounds)
    for name in own if against else ():
        numbers[f"{name}_speed_of_ours_by_theirs"] = numbers[f"their_{name}_seconds"] / numbers[f"{name}_seconds"]
    numbers["forward_flops_per_second"] = shape.flops() / numbers["forward_seconds"]
    numbers["training_temporary_bytes"] = temporaries
    return numbers


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m capvl.bench deformable", description=__doc__, allow_abbrev=False)
    default = Shape()
    for field in ("batch", "height", "width", "channels", "stride"):
        parser.add_argument(f"--{field}", type=int, default=getattr(default, field), help="of the maps")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default=default.dtype, help="of the maps and the kernel"
    )
    parser.add_argument("--rounds", type=int, default=5, help="the fastest of so many")
    parser.add_argument(
        "--against", choices=("", "torchvision"), default="", help="also measure this, on the same numbers"
    )
    parser.add_argument("--json", default="", help="also write the numbers to this file")
    args = vars(parser.parse_args(argv))
    rounds, against, file = (args.pop(name) for name in ("rounds", "against", "json"))
    numbers = measure(Shape(**args), rounds, against)
    for name, value in numbers.items():
        print(f"{name:36s} {value:,.4f}" if value < 1e4 else f"{name:36s} {value:,.0f}")
    if file:
        pathlib.Path(file).write_text(json.dumps(numbers, indent=1))
