"""Trains a recipe twice, left alone and under faults, and compares the results bit by bit.

    python -m capvl.chaos --config=configs/cappa_demo.py:steps=1000 --faults=100

Kills, signals, damaged checkpoints, logs and caches, a full disk, storage that fails, is slow or
hangs; see `capvl.chaos.faults` and `capvl.chaos.inside`. The disturbed run is in a file system
of its own, in memory (Linux user namespaces), which is what is filled.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from capvl.chaos import faults, inside
from capvl.chaos.fleet import Fleet
from capvl.command import config_arguments, run
from capvl.errors import UserError, nearest

WENT_BACK = "went back to an older checkpoint"
_DISK = "CAPVL_CHAOS_DISK"


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """One start of the run.

    Attributes:
      within: a fault inside the process, "" for none.
      end: the fault that ends it, "" for the watchdog's end of a hang.
      step: which the end waits for.
    """

    within: str
    end: str
    step: int


def schedule(kinds: list[str], count: int, steps: int, seed: int) -> list[Disturbance]:
    """`count` faults spread over the run, every kind as often as the others, in random order."""
    rng = random.Random(seed)
    bag = [kinds[i % len(kinds)] for i in range(count)]
    rng.shuffle(bag)
    within = collections.deque(k for k in bag if k in inside.KINDS)
    ends = [k for k in bag if k in faults.KINDS]
    # A hang ends its process; the other faults inside need one that something else ends.
    starts = [(w, "") for w in within if w == "hang"]
    passing = [w for w in within if w != "hang"]
    ends += ["kill"] * max(len(passing) - len(ends), 0)
    starts += [(passing.pop() if passing and end != "kill_at_start" else "", end) for end in ends]
    starts += [(w, "kill") for w in passing]
    rng.shuffle(starts)
    return [
        Disturbance(w, end, 1 + int(steps * 0.9 * (i + rng.random()) / len(starts)))
        for i, (w, end) in enumerate(starts)
    ]


def disturb(fleet: Fleet, plan: list[Disturbance], seed: int, hang_timeout: int, say=print) -> collections.Counter:
    """Runs to the end under the disturbances; counts the faults that happened."""
    happened: collections.Counter = collections.Counter()
    for i, each in enumerate(plan):
        due = functools.partial(_reached, fleet, each.step)
        rng = random.Random(f"{seed} {i}")
        begin, first = time.monotonic(), fleet.step()
        options = (f"--config.hang_timeout={hang_timeout}",) if each.within == "hang" else ()
        fleet.start(each.within, i, options)
        if each.end:
            reached = each.end == "kill_at_start" or fleet.until(due)
            if each.within:
                fleet.until(lambda: inside.FIRED in fleet.printed())
            if reached and fleet.alive():
                faults.KINDS[each.end](fleet, rng)
                happened[each.end] += 1
        codes = fleet.wait()
        if inside.FIRED in fleet.printed():
            happened[each.within] += 1
        names = " and ".join(filter(None, [each.within, each.end]))
        broken = f", {WENT_BACK}" if "is broken" in fleet.printed() else ""
        happened[WENT_BACK] += bool(broken)
        say(
            f"{i + 1:4d}/{len(plan)}  {names:28s} steps {first} to {fleet.step()}, exit {codes}, "
            f"{time.monotonic() - begin:.0f} s{broken}"
        )
    fleet.start()
    if any(codes := fleet.wait()):
        raise UserError(f"The undisturbed end of the run left with {codes}: {fleet.printed()[-500:]}")
    happened[WENT_BACK] += "is broken" in fleet.printed()
    return happened


def _reached(fleet: Fleet, step: int) -> bool:
    return fleet.begun() and fleet.step() >= step


def compare(alone: Fleet, disturbed: Fleet) -> tuple[int, int]:
    """(leaves, steps) that are equal in both runs, bit by bit.

    Raises:
      UserError: a leaf or a loss differs, or a step is missing.
    """
    # JAX is slow to import, and --help doesn't wait for it.
    from capvl.checkpoint import Checkpointer

    expected, found = alone.losses(), disturbed.losses()
    wrong = [s for s in expected if found.get(s) != expected[s]]
    if wrong or expected.keys() != found.keys():
        raise UserError(f"Losses differ, first at step {min(wrong, default='none')}; {len(found)} steps were logged.")
    (a, step), (b, other) = (Checkpointer(str(f.workdir)).read_all() for f in (alone, disturbed))
    if step != other or a.keys() != b.keys():
        raise UserError(f"The last checkpoints are of steps {step} and {other}.")
    different = [name for name in a if not np.array_equal(a[name], b[name])]
    if different:
        raise UserError(f"{len(different)} leaves differ, {different[0]} first.")
    return len(a), len(found)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args, overrides = _arguments(argv)
    # JAX is slow to import, and --help doesn't wait for it.
    from capvl import recipes

    options = [*overrides, ("log_every", "1"), ("checkpoint.keep", "3")]
    recipe = recipes.load(args.config, options)
    kinds = _kinds(args.kinds)
    folder = pathlib.Path(args.workdir).resolve()
    if "fill_disk" in kinds and _DISK not in os.environ:
        if _can_mount():
            sys.exit(_within_own_disk(args.disk, sys.argv[1:] if argv is None else argv))
        print("fill_disk is left out: no file system can be mounted here (unshare --user --map-root-user --mount).")
        kinds.remove("fill_disk")
    flags = [f"--config={args.config}", *(f"--config.{k}={v}" for k, v in options)]
    alone = Fleet(flags, folder / "alone", args.processes, folder / "logs/alone")
    disturbed = Fleet(
        flags, pathlib.Path(os.environ.get(_DISK, folder / "disturbed")), args.processes, folder / "logs/disturbed"
    )
    print(f"{args.config}, left alone", flush=True)
    begin = time.monotonic()
    try:
        alone.start()
        if any(codes := alone.wait()):
            raise UserError(f"The run fails by itself, with exit codes {codes}: {alone.printed()[-500:]}")
        plan = schedule(kinds, args.faults, recipe.steps, args.seed)
        seconds = time.monotonic() - begin
        print(f"{seconds:.0f} s. Now under {args.faults} faults, in {len(plan)} starts", flush=True)
        begin = time.monotonic()
        happened = disturb(disturbed, plan, args.seed, args.hang_timeout)
    finally:
        alone.kill()
        disturbed.kill()
    leaves, steps = compare(alone, disturbed)
    went_back = happened.pop(WENT_BACK, 0)
    result = {
        "config": args.config,
        "seed": args.seed,
        "processes": args.processes,
        "faults": dict(happened),
        "survived": sum(happened.values()),
        "starts": len(plan) + 1,
        "went_back": went_back,
        "steps": steps,
        "leaves": leaves,
        "seconds": round(time.monotonic() - begin),
    }
    print_result(result)
    (folder / "chaos.json").write_text(json.dumps(result, indent=1))
    if _DISK in os.environ:
        shutil.copytree(disturbed.workdir, folder / "disturbed")


def print_result(result: dict) -> None:
    """Faults by kind, and what was compared."""
    for kind, count in sorted(result["faults"].items()):
        print(f"  {kind:16s} {count}")
    print(
        f"{result['survived']} faults survived in {result['starts']} starts and {result['seconds']} s, "
        f"{result['went_back']} times from an older checkpoint: all {result['leaves']} leaves of the last checkpoint "
        f"and the losses of all {result['steps']} steps equal the undisturbed run's, bit by bit."
    )


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m capvl.chaos", description="Disturb a run.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:variant=value,…")
    parser.add_argument("--workdir", default="runs/chaos", help="a new folder for both runs and their logs")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--kinds", default="", help="some of them, with commas; default: all")
    parser.add_argument("--processes", type=int, default=1, help="hosts of the run, here as processes")
    parser.add_argument("--disk", type=int, default=512, help="MiB of the disk that is filled")
    parser.add_argument("--hang_timeout", type=int, default=30, help="seconds without a step that end a hang")
    parser.add_argument("--seed", type=int, default=0)
    args, overrides = config_arguments(parser, argv)
    if args.faults < 1 or args.processes < 1:
        raise UserError("--faults and --processes must be at least 1.")
    if pathlib.Path(args.workdir).exists() and any(pathlib.Path(args.workdir).iterdir()):
        raise UserError(f"--workdir={args.workdir} is not empty; take a new folder.")
    return args, overrides


def _kinds(text: str) -> list[str]:
    known = [*faults.KINDS, *inside.KINDS]
    kinds = text.split(",") if text else known
    for kind in kinds:
        if kind not in known:
            raise UserError(f"--kinds={text}: unknown kind {kind!r}." + nearest(kind, known))
    return kinds


_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def _can_mount() -> bool:
    script = 'mount -t tmpfs -o size=1m none "$(mktemp -d)"'
    try:
        done = subprocess.run([*_NAMESPACE, "sh", "-c", script], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def _within_own_disk(mebibytes: int, argv: list[str]) -> int:
    """Runs this command again where a folder is a file system of so many MiB; returns its exit code."""
    with tempfile.TemporaryDirectory(prefix="capvl-chaos-") as folder:
        script = f'mount -t tmpfs -o size={mebibytes}m none "{folder}" && exec "$@"'
        command = [*_NAMESPACE, "sh", "-c", script, "sh", sys.executable, "-m", "capvl.chaos", *argv]
        return subprocess.run(command, env=os.environ | {_DISK: folder}, check=False).returncode


if __name__ == "__main__":
    run(main)
