"""Speed of the whole loader on JPEGs, and as a ratio to a bare loop of the same decoder at full scale.

    python -m capvl.bench data --tars='…/train/*.tar' --res=96
    python -m capvl.bench data --tars='…/train/*.tar' --res=224 --upscale=640

CPU seconds are this process' own, all its threads included.
"""

import argparse
import io
import json
import pathlib
import tempfile
import time

import simplejpeg
from PIL import Image

from capvl.data import corpus, prepare, sources, streams, tokenizer
from capvl.data.loader import DataOptions, Host, Order, TrainBatch, TrainLoader, stack
from capvl.data.randomness import Uniforms
from capvl.data.transforms import ImageText, random_crop
from capvl.errors import UserError

FEATURES = ("image", "text")


def upscale(pattern: str, short_side: int, count: int, folder: pathlib.Path) -> str:
    """A tar of the first `count` images enlarged to a short side of so many pixels; returns its path."""
    import tarfile

    out = folder / "00000.tar"
    written = 0
    with tarfile.open(out, "w") as archive:
        for path in streams.expand(pattern):
            for sample in streams.tar_samples(path):
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


def measure(name: str, data_dir: str, model: str, res: int, batch: int, batches: int, rounds: int) -> dict[str, float]:
    """CPU seconds an image of the bare decoder, the loader, and the loader's parts; best of `rounds`."""
    options = DataOptions(name=name, data_dir=data_dir, tokenizer=model, threads=1, prefetch=1)
    transform = ImageText.from_options(options, res=res, length=64, train=True)
    source = sources.open_source(name, "train", data_dir, features=FEATURES)
    order = Order([len(source)], [1.0], 0)
    make = TrainBatch([source], order, transform, 0, 0, batch, Host().rows(batch))
    count = batch * batches
    examples = [source[order[n][1]] for n in range(count)]
    boxes = [random_crop(Uniforms(0, n), (1, 1), (0.3, 1.0), (0.75, 1.33)) for n in range(count)]
    rows = [make.example(n) for n in range(batch)]

    def loader():
        batches_of = TrainLoader(options, transform, FEATURES, batch=batch, seed=0)
        next(batches_of)
        begin = time.process_time()
        wall = time.perf_counter()
        for _ in range(batches):
            next(batches_of)
        return (time.process_time() - begin) / count, (time.perf_counter() - wall) / count

    from capvl.data.decode import crop_and_resize, decode

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
        found["loader"], found["loader_wall"] = loader()
        found |= {part: cpu_seconds(call, count) for part, call in parts.items()}
        best = {k: min(v, best.get(k, v)) for k, v in found.items()}
    return best


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m capvl.bench data", description=__doc__, allow_abbrev=False)
    parser.add_argument("--tars", required=True, help="pattern of WebDataset tars with JPEGs")
    parser.add_argument("--res", type=int, default=96, help="pixels of the training images")
    parser.add_argument("--upscale", type=int, default=0, help="enlarge the sources to this short side first")
    parser.add_argument("--images", type=int, default=400, help="how many sources to enlarge")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5, help="the best of so many")
    parser.add_argument("--json", default="", help="also write the numbers to this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        pattern = args.tars
        if args.upscale:
            pattern = upscale(args.tars, args.upscale, args.images, pathlib.Path(folder))
        corpus.prepare("bench", {"train": pattern}, folder)
        model = prepare.scenes_tokenizer(folder)
        numbers = measure("bench", folder, tokenizer.load(model).path, args.res, args.batch, args.batches, args.rounds)
    print_numbers(numbers)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(numbers, indent=1))


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
