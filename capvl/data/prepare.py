"""Prepares data sets.

python -m capvl.data.prepare scenes --config=128
python -m capvl.data.prepare tars --name=flickr8k --train='…/train/*.tar' --val='…/val/*.tar'
python -m capvl.data.prepare tars --name=web --train='gs://…/{000..999}.parquet' --beam='--runner=…'
python -m capvl.data.prepare tars --name=clips --train='…/*.tar' --frames=16
python -m capvl.data.prepare annotated --name=coco --format=karpathy --all=dataset_coco.json --files=coco/
python -m capvl.data.prepare regions --name=vg --format=visual_genome --train=image_data.json,objects.json \\
    --files=vg/ --exclude=refs_unc.json,dataset_coco.json
python -m capvl.data.prepare look --data=vg --out=vg.html
python -m capvl.data.prepare odvg --data=vg --out=vg.jsonl
python -m capvl.data.prepare index --stream='gs://…/{00000..00999}.tar' --out=gs://…/index
python -m capvl.data.prepare tfds --name=coco_captions
"""

import argparse
import functools
import pathlib
import shlex

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from capvl import storage
from capvl.command import run
from capvl.data.preparing import (
    annotated,
    annotations,
    catalog,
    corpus,
    filters,
    look,
    region_formats,
    region_sets,
    regional,
)
from capvl.data.reading import patterns, sources, stream_index
from capvl.data.reading.samples import Names
from capvl.data.reading.streams import PREFIX
from capvl.data.scenes import making
from capvl.errors import UserError
from capvl.lines import read_lines


def print_report(folder: pathlib.Path) -> None:
    """How many examples a prepared data set has, and what was rejected and why."""
    console = Console()
    report = storage.read_json(folder / "report.json")
    headings = ("split", "what", "count", "first", "files")
    table = Table(*(Column(heading, overflow="fold") for heading in headings), title=escape(str(folder)))
    for split, entry in report.items():
        for what in ("examples", "captions", "boxes", "crowds", "phrases", "attributes"):
            if what in entry:
                table.add_row(split, what, str(entry[what]), "", "")
        for what, column in entry.get("columns", {}).items():
            table.add_row(split, f"{what} from column", "", escape(column), "")
        for reason, rejected in sorted(entry["rejected"].items()):
            names = (" ".join(rejected["first"]), " ".join(entry.get("files", {}).get(reason, ())))
            table.add_row(split, escape(f"rejected: {reason}"), str(rejected["count"]), *map(escape, names))
        for reason, changed in sorted(entry.get("changed", {}).items()):
            names = escape(" ".join(changed["first"]))
            table.add_row(split, escape(f"changed: {reason}"), str(changed["count"]), names, "")
        for name, count in entry.get("images that are trained on in", {}).items():
            table.add_row(split, escape(f"IMAGES THAT {name} TRAINS ON: make it anew"), str(count), "", "")
    console.print(table)


def _filter_arguments(sub: argparse.ArgumentParser) -> None:
    default = filters.Filters()
    sub.add_argument("--beam", help="options of Apache Beam, to run there, such as '--runner=DirectRunner'")
    sub.add_argument("--min_side", type=int, default=default.min_side, help="pixels")
    sub.add_argument("--max_aspect", type=float, default=default.max_aspect, help="longer / shorter side")
    sub.add_argument("--min_text", type=int, default=default.min_text, help="characters of a caption")
    sub.add_argument("--max_text", type=int, default=default.max_text, help="characters; 0: no limit")
    sub.add_argument("--languages", default="", help="such as en,de; default: all")
    sub.add_argument("--blocklist", default="", help="file with words, phrases and url:PARTS that are not let in")
    sub.add_argument("--duplicates", default="", help="leave out later samples with the same: image,text")


def _annotated_arguments(sub: argparse.ArgumentParser) -> None:
    shown = "; ".join(f"{name}: {','.join(files)}" for name, (_, files) in annotations.FORMATS.items())
    sub.add_argument("--format", required=True, help=f"with its annotation files: {shown}")
    for split in ("train", "val", "test"):
        sub.add_argument(f"--{split}", default="", help=f"annotation files of split {split}, with commas between them")
    sub.add_argument("--all", default="", help="annotation files that say themselves which split is whose")
    sub.add_argument("--files", default="", help="folder of the images or videos")


def _regions_arguments(sub: argparse.ArgumentParser) -> None:
    shown = "; ".join(f"{name}: {','.join(f.files)} ({f.boxes})" for name, f in region_formats.FORMATS.items())
    default = regional.Rules()
    sub.add_argument("--format", required=True, help=f"with its annotation files, and boxes: {shown}")
    for split in ("train", "val", "test"):
        sub.add_argument(f"--{split}", default="", help=f"annotation files of split {split}, with commas between them")
    sub.add_argument("--all", default="", help="annotation files that say themselves which split is whose")
    sub.add_argument("--files", default="", help="folder of the images")
    sub.add_argument(
        "--exclude", default="", help="files that name images of evaluations, 'prepared' or 'own', with commas between"
    )
    sub.add_argument("--allow_leaks", action="store_true", help="train on images of evaluations, too")
    sub.add_argument("--image_data", default="", help="Visual Genome's, for other formats that name its images")
    sub.add_argument("--max_phrase", type=int, default=default.max_phrase, help="characters of a phrase")
    sub.add_argument("--classes", default="", help="names of all classes by label, where the annotations have no list")
    sub.add_argument("--min_score", type=float, default=default.min_score, help="of boxes that a teacher found")
    sub.add_argument(
        "--turned", default=default.turned, help=f"boxes of images that EXIF turns: {', '.join(regional.TURNED)}"
    )
    sub.add_argument("--beam", help="options of Apache Beam, to run there, such as '--runner=DirectRunner'")


def _regions(args: argparse.Namespace, data_dir: str) -> None:
    print_report(
        region_sets.prepare(
            args.name,
            args.format,
            _files(args),
            args.files,
            data_dir,
            exclude=tuple(filter(None, args.exclude.split(","))),
            allow_leaks=args.allow_leaks,
            image_data=args.image_data,
            names=read_lines(args.classes, "class names") if args.classes else (),
            rules=regional.Rules(args.max_phrase, args.turned, args.min_score),
            workers=args.workers,
            beam=None if args.beam is None else shlex.split(args.beam),
        )
    )


def _files(args: argparse.Namespace) -> dict[str, list[str]]:
    return {s: v.split(",") for s in ("train", "val", "test", "all") if (v := getattr(args, s))}


def _filters(args: argparse.Namespace) -> filters.Filters:
    return filters.Filters(
        min_side=args.min_side,
        max_aspect=args.max_aspect,
        min_text=args.min_text,
        max_text=args.max_text,
        languages=tuple(filter(None, args.languages.split(","))),
        blocklist=filters.read_blocklist(args.blocklist) if args.blocklist else (),
        duplicates=tuple(filter(None, args.duplicates.split(","))),
    )


def _index_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--stream", required=True, action="append", help="pattern of the files; may be given again")
    sub.add_argument("--out", default="", help="folder, for data.index; default: one in the data directory")
    sub.add_argument("--scan", action="store_true", help="read each file, whatever stands beside it")
    sub.add_argument("--workers", type=int, default=0, help="processes; default: one a core")
    sub.add_argument("--beam", help="options of Apache Beam, to run there, such as '--runner=DirectRunner'")


def _index(args: argparse.Namespace, data_dir: str) -> None:
    spread = None
    if args.beam is not None:
        # Optional.
        from capvl.data.preparing.beam import map_on_beam

        spread = functools.partial(map_on_beam, options=shlex.split(args.beam))
    for stream in args.stream:
        pattern = stream.removeprefix(PREFIX)
        folder = stream_index.folder_of(pattern, args.out, data_dir, alone=len(args.stream) == 1)
        files = patterns.expand(pattern)
        made = stream_index.open_index(
            pattern, files, folder, scan=args.scan, workers=args.workers, spread=spread, must_keep=True
        )
        for path, entry in zip(made.files, made.entries, strict=True):
            if entry.error:
                print(f"{path}: {entry.error}")
        print(f"{folder}: {made.records:,} records of {len(files):,} files")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m capvl.data.prepare", description="Prepare a data set for capvl.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("scenes", "tars", "annotated", "regions", "look", "odvg", "index", "tfds"):
        sub = commands.add_parser(command, allow_abbrev=False)
        sub.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
        if command == "scenes":
            sub.add_argument("--config", default="64")
            continue
        if command in ("look", "odvg"):
            sub.add_argument("--data", required=True, help="a prepared data set")
            sub.add_argument("--split", default="train")
            sub.add_argument("--out", required=True, help="of the page (a .png comes beside it), or of the lines")
            if command == "odvg":
                sub.add_argument("--images", default="", help="folder that the images are written to")
            if command == "look":
                sub.add_argument("--count", type=int, default=24, help="pictures")
                sub.add_argument("--seed", type=int, default=0, help="of which ones")
            continue
        if command == "index":
            _index_arguments(sub)
            continue
        sub.add_argument("--name", required=True)
        if command == "tars":
            for split in ("train", "val", "test"):
                sub.add_argument(f"--{split}", default="", help=f"pattern of the tar or parquet files of split {split}")
            sub.add_argument("--image", default="", help="column or suffix of the images; default: by its name")
            sub.add_argument("--text", default="", help="column, suffix or key of the captions; default: by its name")
            _filter_arguments(sub)
        if command == "annotated":
            _annotated_arguments(sub)
        if command in ("tars", "annotated"):
            sub.add_argument("--frames", type=int, default=0, help="of clips, so many are kept; default: images")
        if command == "regions":
            _regions_arguments(sub)
        if command in ("tars", "annotated", "regions"):
            sub.add_argument("--workers", type=int, default=0, help="processes; default: one a core")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = _parser().parse_args(argv)
    data_dir = args.data_dir or sources.default_data_dir()
    if args.command == "scenes":
        print(making.scenes(args.config, data_dir))
        print(making.scenes_tokenizer(data_dir))
    elif args.command == "tfds":
        print(catalog.from_tfds(args.name, data_dir))
    elif args.command == "annotated":
        how = data_dir, args.frames, args.workers
        print_report(annotated.prepare(args.name, args.format, _files(args), args.files, *how))
    elif args.command == "regions":
        _regions(args, data_dir)
    elif args.command == "index":
        _index(args, data_dir)
    elif args.command == "look":
        print(*look.look(args.data, args.split, args.count, args.out, data_dir, args.seed), sep="\n")
    elif args.command == "odvg":
        counts = look.write_odvg(args.data, args.split, args.out, data_dir, args.images)
        print(", ".join(f"{n} lines of {kind}" for kind, n in counts.items()))
    else:
        splits = {s: getattr(args, s) for s in ("train", "val", "test") if getattr(args, s)}
        if not splits:
            raise UserError("Say which tars: --train='…/*.tar', --val=…, --test=….")
        beam = None if args.beam is None else shlex.split(args.beam)
        print_report(
            corpus.prepare(
                args.name,
                splits,
                data_dir,
                filters=_filters(args),
                frames=args.frames,
                names=Names(args.image, args.text),
                workers=args.workers,
                beam=beam,
            )
        )


if __name__ == "__main__":
    run(main)
