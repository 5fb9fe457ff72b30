"""Speed of the whole loader on JPEGs, and as a ratio to a bare loop of the same decoder at full scale.

    python -m capvl.bench data --tars='…/train/*.tar' --res=96
    python -m capvl.bench data --tars='…/train/*.tar' --res=224 --upscale=640 --config=configs/cappa_l16.py
    python -m capvl.bench data --stream='…/train/*.tar' --positions=0,6400,64000,256000

CPU seconds are this process' own, all its threads included. With recipes it also says how many
cores a host of each TPU needs to keep its chips fed; with --workers how the loader scales; with
--stream how long a run takes to its first batch after it was resumed at a position.
"""

import argparse
import dataclasses
import io
import json
import pathlib
import tarfile
import tempfile
import time

import simplejpeg
from PIL import Image
from rich.table import Table

from capvl import recipes
from capvl.bench import resume
from capvl.chips import CHIPS, Chip
from capvl.data.examples.image_text import ImageText
from capvl.data.images.crops import random_crop
from capvl.data.images.decode import crop_and_resize, decode
from capvl.data.options import DataOptions
from capvl.data.preparing import corpus
from capvl.data.randomness import Uniforms
from capvl.data.reading import patterns, samples, sources
from capvl.data.reading.batches import stack
from capvl.data.reading.loader import Host, Order, TrainBatch, TrainLoader
from capvl.data.scenes import making
from capvl.errors import UserError
from capvl.terminal import console

FEATURES = ("image", "text")


def upscale(pattern: str, short_side: int, count: int, folder: pathlib.Path) -> str:
    """A tar of the first `count` images enlarged to a short side of so many pixels; returns its path."""
    out = folder / "00000.tar"
    written = 0
    with tarfile.open(out, "w") as archive:
        for path in patterns.expand(pattern):
            for sample in samples.tar_samples(path):
                if "jpg" not in sample or written == count:
                    continue
                with Image.open(io.BytesIO(sample["jpg"])) as image:
                    scale = short_side / min(image.size)
                    size = [round(s * scale) for s in image.size]
                    buffer = io.BytesIO()
                    image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
                for suffix, data in (("jpg", buffer.getvalue()), ("txt", sample.get("txt", b"a photo"))):
                    member = tarfile.TarInfo(f"{written:09d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                written += 1
    if not written:
        raise UserError(f"No JPEG in {pattern!r}.")
    return str(out)


def cpu_seconds(call, count: int) -> float:
    """CPU seconds of `call()` for each of `count` images."""
    begin = time.process_time()
    call()
    return (time.process_time() - begin) / count


def loader_seconds(options: DataOptions, transform, batch: int, batches: int) -> tuple[float, float]:
    """(CPU seconds of this process, wall seconds) of one image in the whole loader."""
    loader = TrainLoader(options, transform, FEATURES, batch=batch, seed=0)
    next(loader)
    begin, wall = time.process_time(), time.perf_counter()
    for _ in range(batches):
        next(loader)
    count = batch * batches
    return (time.process_time() - begin) / count, (time.perf_counter() - wall) / count


def measure(options: DataOptions, res: int, batch: int, batches: int, rounds: int) -> dict[str, float]:
    """CPU seconds an image of the bare decoder, the loader, and the loader's parts; best of `rounds`."""
    transform = ImageText.from_options(options, res=res, length=64, train=True)
    source = sources.open_source(options.name, "train", options.data_dir, features=FEATURES)
    order = Order([len(source)], [1.0], 0)
    make = TrainBatch([source], order, transform, 0, 0, batch, Host().rows(batch))
    count = batch * batches
    examples = [source[order[n][1]] for n in range(count)]
    boxes = [random_crop(Uniforms(0, n), (1, 1), (0.3, 1.0), (0.75, 1.33)) for n in range(count)]
    rows = [make.example(n) for n in range(batch)]

    parts = {
        "order": lambda: [order[n] for n in range(count)],
        "read": lambda: [source[n % len(source)] for n in range(count)],
        "decode": lambda: [decode(e["image"], res, res) for e in examples],
        "decode, crop, resize": lambda: [
            crop_and_resize(e["image"], b, res) for e, b in zip(examples, boxes, strict=True)
        ],
        "tokenize": lambda: [transform.tokenizer(e["text"][0], 64) for e in examples],
        "stack": lambda: [stack(rows) for _ in range(batches)],
    }
    best: dict[str, float] = {}
    for _ in range(rounds):
        found = {"bare": cpu_seconds(lambda: [simplejpeg.decode_jpeg(e["image"]) for e in examples], count)}
        found["loader"], found["loader_wall"] = loader_seconds(options, transform, batch, batches)
        found |= {part: cpu_seconds(call, count) for part, call in parts.items()}
        best = {k: min(v, best.get(k, v)) for k, v in found.items()}
    return best


def cores_needed(flops: float, seconds: float, mfu: float, chip: Chip) -> tuple[float, float]:
    """(images/s of a host's chips, cores that decode as many).

    Args:
      flops: of training on one image.
      seconds: of a core for one image.
      mfu: share of the peak at which the chips work.
      chip: of the host.
    """
    rate = chip.chips_a_host * chip.flops * mfu / flops
    return rate, rate * seconds


def scaling(options: DataOptions, transform, batch: int, batches: int, most: int) -> dict[int, float]:
    """Number of worker processes -> images/s; 0 is the loader in one thread of this process."""
    rates = {}
    for workers in (0, *(2**i for i in range(most.bit_length()) if 2**i <= most)):
        _, wall = loader_seconds(dataclasses.replace(options, workers=workers), transform, batch, batches)
        rates[workers] = 1 / wall
    return rates


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m capvl.bench data", description=__doc__, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tars", help="pattern of WebDataset tars with JPEGs")
    what.add_argument("--stream", help="pattern of files that are streamed")
    parser.add_argument("--positions", default="0", help="of a stream, at which it is resumed, with commas between")
    parser.add_argument("--index", default="", help="folder of the stream's index; default: one that is made anew")
    parser.add_argument("--res", type=int, default=96, help="pixels of the training images")
    parser.add_argument("--upscale", type=int, default=0, help="enlarge the sources to this short side first")
    parser.add_argument("--images", type=int, default=400, help="how many sources to enlarge")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5, help="the best of so many")
    parser.add_argument("--config", action="append", default=[], help="a recipe; may be given again")
    parser.add_argument("--mfu", type=float, default=0.5, help="share of their peak at which chips are to be fed")
    parser.add_argument("--workers", type=int, default=0, help="also measure up to so many worker processes")
    parser.add_argument("--json", default="", help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if args.stream:
        found = resume.measure(args.stream, [int(p) for p in args.positions.split(",")], args)
        resume.print_numbers(found)
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(found, indent=1))
        return
    wanted = {spec: recipes.load(spec) for spec in args.config}
    with tempfile.TemporaryDirectory() as folder:
        pattern = args.tars
        if args.upscale:
            pattern = upscale(args.tars, args.upscale, args.images, pathlib.Path(folder))
        corpus.prepare("bench", {"train": pattern}, folder)
        options = DataOptions(
            name="bench", data_dir=folder, tokenizer=making.scenes_tokenizer(folder), threads=1, prefetch=1
        )
        numbers = measure(options, args.res, args.batch, args.batches, args.rounds)
        print_numbers(numbers)
        if wanted:
            numbers["recipes"] = measure_recipes(wanted, options, args)
        if args.workers:
            transform = ImageText.from_options(options, res=args.res, length=64, train=True)
            numbers["images_per_second_by_workers"] = scaling(
                options, transform, args.batch, 4 * args.batches, args.workers
            )
            print_scaling(numbers["images_per_second_by_workers"])
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(numbers, indent=1))


def measure_recipes(wanted: dict, options: DataOptions, args) -> list[dict]:
    """For each recipe and TPU, what a host's chips take and the cores that it needs; printed as a table."""
    table = Table(
        "recipe", "CPU ms an image", "chip", "images/s a host", "cores needed", "cores there", title_justify="left"
    )
    table.title = f"Cores that keep a host's chips fed at {args.mfu:.0%} of their peak"
    rows = []
    for spec, recipe in wanted.items():
        own = dataclasses.replace(
            recipe.data,
            name="bench",
            data_dir=options.data_dir,
            tokenizer=options.tokenizer,
            threads=1,
            workers=0,
            prefetch=1,
        )
        transform = recipe.objective.transform(recipe.model, own, train=True)
        cpu = min(loader_seconds(own, transform, args.batch, args.batches)[0] for _ in range(args.rounds))
        for chip in CHIPS:
            if chip.chips_a_host:
                rate, cores = cores_needed(recipe.objective.flops(recipe.model), cpu, args.mfu, chip)
                rows.append(
                    {"config": spec, "cpu_seconds": cpu, "chip": chip.name, "images_per_second": rate, "cores": cores}
                    | {"cores_a_host": chip.cores_a_host}
                )
                table.add_row(
                    spec, f"{1e3 * cpu:.3f}", chip.name, f"{rate:,.0f}", f"{cores:.1f}", str(chip.cores_a_host)
                )
    console().print(table)
    return rows


def print_scaling(rates: dict[int, float]) -> None:
    """Images/s by worker processes, and as a ratio to one."""
    for workers, rate in rates.items():
        where = f"{workers} worker processes" if workers else "one thread of this process"
        print(f"{where:28s} {rate:8.0f} images/s   {rate / rates.get(1, rate):5.2f} of one worker")


def print_numbers(numbers: dict[str, float]) -> None:
    """The table."""
    bare, loader = numbers["bare"], numbers["loader"]
    print(f"{'bare decoder, full scale':28s} {1e3 * bare:8.4f} ms CPU an image")
    print(f"{'whole loader':28s} {1e3 * loader:8.4f} ms CPU an image   {1 / loader:8.0f} images/s/core")
    print(f"{'ratio loader : bare':28s} {bare / loader:8.3f}")
    known = 0.0
    for part in ("order", "read", "decode, crop, resize", "tokenize", "stack"):
        known += numbers[part]
        print(f"  {part:26s} {1e3 * numbers[part]:8.4f} ms   {100 * numbers[part] / loader:5.1f} %")
    print(f"  {'of it decode':26s} {1e3 * numbers['decode']:8.4f} ms")
    rest = loader - known
    print(f"  {'rest: threads, batches':26s} {1e3 * rest:8.4f} ms   {100 * rest / loader:5.1f} %")
