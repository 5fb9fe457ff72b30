"""Prepares data sets.

python -m capvl.data.prepare scenes --config=128
python -m capvl.data.prepare tars --name=flickr8k --train='…/train/*.tar' --val='…/val/*.tar'
python -m capvl.data.prepare tars --name=web --train='gs://…/{000..999}.parquet' --beam='--runner=…'
python -m capvl.data.prepare tars --name=clips --train='…/*.tar' --frames=16
python -m capvl.data.prepare annotated --name=coco --format=karpathy --all=dataset_coco.json --files=coco/
python -m capvl.data.prepare tfds --name=coco_captions
"""

import argparse
import pathlib
import shlex

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from capvl import storage
from capvl.command import run
from capvl.data.preparing import annotated, annotations, catalog, corpus, filters
from capvl.data.reading import sources
from capvl.data.reading.samples import Names
from capvl.data.scenes import making
from capvl.errors import UserError


def print_report(folder: pathlib.Path) -> None:
    """How many examples a prepared data set has, and what was rejected and why."""
    console = Console()
    report = storage.read_json(folder / "report.json")
    headings = ("split", "what", "count", "first", "files")
    table = Table(*(Column(heading, overflow="fold") for heading in headings), title=escape(str(folder)))
    for split, entry in report.items():
        table.add_row(split, "examples", str(entry["examples"]), "", "")
        for what, column in entry.get("columns", {}).items():
            table.add_row(split, f"{what} from column", "", escape(column), "")
        for reason, rejected in sorted(entry["rejected"].items()):
            names = (" ".join(rejected["first"]), " ".join(entry.get("files", {}).get(reason, ())))
            table.add_row(split, escape(f"rejected: {reason}"), str(rejected["count"]), *map(escape, names))
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


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m capvl.data.prepare", description="Prepare a data set for capvl.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("scenes", "tars", "annotated", "tfds"):
        sub = commands.add_parser(command, allow_abbrev=False)
        sub.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
        if command == "scenes":
            sub.add_argument("--config", default="64")
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
            sub.add_argument("--workers", type=int, default=0, help="processes; default: one a core")
    args = parser.parse_args(argv)
    data_dir = args.data_dir or sources.default_data_dir()
    if args.command == "scenes":
        print(making.scenes(args.config, data_dir))
        print(making.scenes_tokenizer(data_dir))
    elif args.command == "tfds":
        print(catalog.from_tfds(args.name, data_dir))
    elif args.command == "annotated":
        splits = {s: v.split(",") for s in ("train", "val", "test", "all") if (v := getattr(args, s))}
        print_report(annotated.prepare(args.name, args.format, splits, args.files, data_dir, args.frames, args.workers))
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
