"""Speed of an image encoder's forward pass, beside timm's in PyTorch with the same weights, in one run.

    python -m capvl.bench encoder --encoder=swin-T/4 --against=timm
    python -m capvl.bench encoder --encoder=B/16 --batch=4

Both sides take turns, so that what else the machine does hits both; ratios are of the fastest rounds.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from capvl.bench import costs
from capvl.bench.step import matmul_rate
from capvl.convert import swin, timm
from capvl.errors import UserError
from capvl.models.encoder import EncoderOptions
from capvl.models.parameters import Blueprint


def options_of(encoder: str, res: int, window: int, unroll: bool) -> EncoderOptions:
    """An encoder of timm's form: mean pooling, exact GELU."""
    kind = EncoderOptions(encoder=encoder, res=res, window=window, activation="gelu", dtype="float32", unroll=unroll)
    return dataclasses.replace(kind, eps=swin.EPS) if swin.fits(kind) else kind


def ours(options: EncoderOptions, params: dict[str, jax.Array], image) -> tuple[Callable, str]:
    """A call that gives the pooled features of images, and its program's text."""
    blueprint = Blueprint(options)
    compiled = jax.jit(lambda params, image: blueprint.bind(params).features(image)).lower(params, image).compile()
    return lambda: jax.block_until_ready(compiled(params, image)), compiled.as_text()


def theirs(options: EncoderOptions, params: dict[str, np.ndarray], image: np.ndarray) -> Callable[[], np.ndarray]:
    """The same by timm.

    Raises:
      UserError: timm or PyTorch is not installed.
    """
    try:
        # Optional, and slow to import.
        import timm as library
        import torch
    except ImportError as e:
        raise UserError(f"--against=timm needs timm and PyTorch: pip install timm ({e}).") from e
    state, config = (swin.write_timm if swin.fits(options) else timm.write_timm)(options, params)
    model = library.create_model(config["architecture"], **config["model_args"]).eval()
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))

    def call():
        with torch.inference_mode():
            return model(pixels).numpy()

    return call


def turns(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Seconds of each call in its fastest round."""
    best: dict[str, float] = {}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - begin)
    return best


def measure(options: EncoderOptions, batch: int, rounds: int, against: str, show_costs: int = 0) -> dict[str, float]:
    """Seconds, FLOP/s and share of a bare matmul's rate of our forward pass; with `against` also the other's.

    Raises:
      UserError: what it is measured against isn't there, or gives other features.
    """
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (batch, options.res, options.res, 3)).astype(np.float32)
    params = {name: np.asarray(value) for name, value in Blueprint(options).init(jax.random.key(0)).items()}
    own, program = ours(options, {k: jnp.asarray(v) for k, v in params.items()}, jnp.asarray(image))
    calls = {"seconds": own}
    if against:
        calls["their_seconds"] = theirs(options, params, image)
        expected, found = calls["their_seconds"](), np.asarray(own())
        worst = float(np.abs(found - expected).max() / np.abs(expected).max())
        if worst > 1e-3:
            raise UserError(f"{against} gives other features for the same weights, off by {worst:.2g} of the largest.")
    numbers = turns(calls, rounds)
    if against:
        numbers["speed_of_ours_by_theirs"] = numbers["their_seconds"] / numbers["seconds"]
    numbers["images_per_second"] = batch / numbers["seconds"]
    numbers["flops_per_second"] = options.encoder_flops() * batch / numbers["seconds"]
    if jax.default_backend() == "cpu":
        numbers["share_of_matmul"] = numbers["flops_per_second"] / matmul_rate()
    for cost in costs.measure(own, program, times=3)[:show_costs] if show_costs else ():
        print(f"{cost.share:6.1%} {cost.seconds * 1e3:9.3f} ms  {cost.where}")
    return numbers


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m capvl.bench encoder", description=__doc__, allow_abbrev=False)
    parser.add_argument("--encoder", default="swin-T/4", help="as model.encoder")
    parser.add_argument("--res", type=int, default=224, help="side of the images")
    parser.add_argument("--window", type=int, default=7, help="of a Swin")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10, help="the fastest of so many")
    parser.add_argument("--against", choices=("", "timm"), default="", help="also measure this, with our weights")
    parser.add_argument("--loop", action="store_true", help="layers in a loop instead of straight-line code")
    parser.add_argument("--costs", type=int, default=0, help="print so many of the costliest lines of the source")
    parser.add_argument("--json", default="", help="also write the numbers to this file")
    args = parser.parse_args(argv)
    options = options_of(args.encoder, args.res, args.window, not args.loop)
    numbers = measure(options, args.batch, args.rounds, args.against, args.costs)
    for name, value in numbers.items():
        print(f"{name:28s} {value:,.4f}" if value < 1e4 else f"{name:28s} {value:,.0f}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(numbers, indent=1))
