"""Images with annotations of regions -> a tfds data set in ArrayRecord files, here or on Apache Beam.

`region_formats` is the index of what is read. Annotations are read first and dealt to parts of EACH images; a part
that is finished is never made again, so a killed preparation goes on where it stopped. What is left out is counted by
reason.
"""

import base64
import binascii
import concurrent.futures
import functools
import importlib.util
import json
import multiprocessing
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from capvl import storage
from capvl.data.preparing import annotated, leaks, regional
from capvl.data.preparing.annotations import IMAGE_SUFFIXES
from capvl.data.preparing.detections import Classes
from capvl.data.preparing.groundings import coco_ids
from capvl.data.preparing.publish import VERSION, Shard, check_name, publish
from capvl.data.preparing.region_formats import FORMATS, SHOWN, read
from capvl.data.preparing.regional import Annotated, Rules
from capvl.data.reading import sources
from capvl.data.reading.classes import CLASSES
from capvl.data.reading.rejected import Rejected, RejectedError
from capvl.errors import UserError, nearest

EACH = 1000
COUNTED = ("boxes", "crowds", "phrases", "attributes")


class Job(NamedTuple):
    """One part: its records go to `part`, what they are made of is in `part`.items.json."""

    part: str
    source: str
    classes: list[str]
    rules: Rules
    data_dir: str
    listed: bool


def prepare(
    name: str,
    format: str,
    splits: dict[str, list[str]],
    files: str,
    data_dir: str,
    *,
    exclude: Sequence[str] = (),
    allow_leaks: bool = False,
    image_data: str = "",
    names: Sequence[str] = (),
    rules: Rules | None = None,
    workers: int = 0,
    beam: list[str] | None = None,
) -> epath.Path:
    """Prepares a data set of regions.

    Args:
      name: of the data set to make.
      format: a key of FORMATS.
      splits: split -> its annotation files; "all" for files that say which split is whose.
      files: folder of the images; "" where the annotations name whole paths or hold the images.
      data_dir: where prepared data sets are; with Beam also a bucket.
      exclude, allow_leaks: see `capvl.data.preparing.leaks.evaluations`.
      image_data: Visual Genome's image_data.json, for other formats that name its images: whose numbers COCO's are.
      names: of all classes, in the order of the labels, where the annotations have no closed list.
      rules: what is let in.
      workers: processes; 0 for one a core.
      beam: options of Apache Beam, to run there instead; None for here.

    Returns:
      The data set's folder; it holds `report.json` and `images.json`.

    Raises:
      UserError: bad annotations, evaluations that are not named, no images, or a data set of that name.
    """
    folder = _check(name, format, splits, data_dir, rules := rules or Rules(), beam)
    items, left, classes = read(format, splits, data_dir)
    classes = _closed(names, classes, items) if names else classes
    if image_data:
        items = _with_coco_ids(items, coco_ids(image_data))
    training = FORMATS[format].leaks and "train" in items and not _only_scenes(format, splits)
    evaluations = leaks.evaluations(exclude, data_dir, allow_leaks, training)
    # A set of images that only this one knows has no leaks, and yet may have one image in two splits.
    others = {} if allow_leaks else {own: rows for own, rows in items.items() if own != "train"}
    named_in = files if FORMATS[format].paths else None
    evaluations += [leaks.of_items(own, rows, named_in) for own, rows in others.items()]
    if "train" in items:
        items["train"] = _without(items["train"], evaluations, left["train"], files)
    parts = storage.folder(data_dir) / name / "incomplete"
    jobs = _deal(items, files, parts, Job("", format, list(classes), rules, data_dir, _listed(items)))
    if beam is None:
        _run_here([job for _, job in jobs], workers)
    else:
        from capvl.data.preparing.beam import map_on_beam  # Optional, and slow to import.

        map_on_beam(write_part, [job for _, job in jobs], beam)
    _finish(folder, name, jobs, left, items, classes, evaluations, named_in)
    parts.rmtree()
    return folder


def _closed(names: Sequence[str], classes: Classes, items: dict[str, list[Annotated]]) -> Classes:
    """Classes by the list that the user gives.

    Raises:
      UserError: the annotations have their own list, or a class that isn't in this one.
    """
    if classes and list(classes) != list(names):
        raise UserError(f"The annotations have a list of {len(classes)} classes of their own, which --classes isn't.")
    for rows in items.values():
        for item in rows:
            for entity in (*item.entities, *item.crowds):
                if entity.category and entity.category not in names:
                    raise UserError(f"The class {entity.category!r} of image {item.image!r} isn't one of --classes.")
    return classes or {name: {} for name in names}


def _check(name, format, splits, data_dir, rules: Rules, beam) -> epath.Path:
    """The data set's folder, where the arguments make sense."""
    check_name(name)
    if format not in FORMATS:
        raise UserError(f"The format {format!r} is unknown." + nearest(format, FORMATS))
    if not splits:
        raise UserError("Say which annotation files: --train=…, --val=…, --test=…, or --all=….")
    if rules.turned not in regional.TURNED:
        raise UserError(f"--turned={rules.turned!r} is unknown." + nearest(rules.turned, regional.TURNED))
    if not 0 <= rules.min_score <= 1:
        raise UserError(f"--min_score must be between 0 and 1, not {rules.min_score:g}.")
    if rules.max_phrase < 1:
        raise UserError(f"--max_phrase must be at least 1, not {rules.max_phrase}.")
    if beam is not None and not importlib.util.find_spec("apache_beam"):
        raise UserError("Preparing on Apache Beam needs it installed: pip install -e '.[beam]'.")
    folder = storage.folder(data_dir) / name / VERSION
    if folder.exists():
        raise UserError(f"Data set {name!r} is already prepared in {folder}; remove that folder to make it anew.")
    return folder


def _with_coco_ids(items: dict[str, list[Annotated]], known: dict[str, str]) -> dict[str, list[Annotated]]:
    """The images with their numbers in COCO, where these are known by the names of their files."""
    return {
        own: [row._replace(coco_id=row.coco_id or known.get(leaks.stem(row.image), "")) for row in rows]
        for own, rows in items.items()
    }


def _listed(items: dict[str, list[Annotated]]) -> bool:
    """Whether images say which classes were looked for in them."""
    return any(item.negative or item.not_exhaustive for rows in items.values() for item in rows)


def _only_scenes(format: str, splits: dict[str, list[str]]) -> bool:
    names = [name for own in splits.values() for name in own]
    return format == "prepared" and all(name.split("/")[0] == "scenes" for name in names)


def _without(rows: list[Annotated], evaluations: list[leaks.Evaluation], left: Rejected, folder: str):
    """Images that nothing is evaluated on."""
    kept = []
    for item in rows:
        name = next((e.name for e in evaluations if e.has(item, folder)), None)
        if name is None:
            kept.append(item)
        else:
            left.count(f"image of the evaluation {name}", (item.id or item.image)[:SHOWN])
    return kept


def _deal(items, files: str, parts: epath.Path, job: Job) -> list[tuple[str, Job]]:
    """(split, job) of every part, whose items are written beside it."""
    names = dict.fromkeys(item.image for rows in items.values() for item in rows if item.image)
    if job.source == "prepared":
        paths = {name: (name, "") for name in names}
    elif files and storage.in_bucket(storage.folder(files)):  # Listing a bucket would take longer than reading it.
        paths = {name: (str(storage.folder(files) / name), "") for name in names}
    else:
        inside = {name: (name, "") for name in names if _MEMBER.fullmatch(name)}
        paths = inside | annotated.find_files((name for name in names if name not in inside), files, IMAGE_SUFFIXES)
        # What no file is called may be a record of a prepared data set.
        paths |= {name: (name, "") for name, (file, _) in paths.items() if not file and _RECORD.fullmatch(name)}
    dealt = [
        (split, job._replace(part=str(parts / f"{split}-{number:05d}")), rows[first : first + EACH])
        for split, rows in items.items()
        for number, first in enumerate(range(0, len(rows), EACH))
    ]
    storage.make_folder(parts)
    names = [os.path.basename(own.part) for _, own, _ in dealt]
    claim(parts / "plan.json", json.dumps([job.source, job.classes, job.rules, job.listed, names]))
    for _, own, rows in dealt:
        listed = [[regional.plain(item), *paths.get(item.image, ("", ""))] for item in rows]
        claim(storage.folder(own.part + ".items.json"), json.dumps(listed))
    return [(split, own) for split, own, _ in dealt]


def claim(file: epath.Path, text: str) -> None:
    """Writes a file of a preparation.

    Raises:
      UserError: it is there, with another text.
    """
    if not file.exists():
        storage.replace_text(file, text)
    elif storage.read_text(file) != text:
        raise UserError(
            f"{file.parent} holds an unfinished preparation of other annotations, images or options; remove it to "
            f"begin anew."
        )


def _run_here(jobs: list[Job], workers: int) -> None:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "parts", TimeRemainingColumn())
    spawn = multiprocessing.get_context("spawn")
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers == 1:
        for job in jobs:
            write_part(job)
        return
    with Progress(*columns) as progress, concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        task = progress.add_task("preparing", total=len(jobs))
        for future in concurrent.futures.as_completed([pool.submit(write_part, job) for job in jobs]):
            future.result()
            progress.advance(task)


def write_part(job: Job) -> None:
    """Makes the records of a part and, last, its report; does nothing where that is there.

    Raises:
      UserError: storage failed again and again.
    """
    if not storage.folder(job.part + ".json").exists():
        storage.retry(_write_part, job, what=f"Preparing {job.part!r}")


def _write_part(job: Job) -> None:
    # Slow to import.
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    labels = {name: i for i, name in enumerate(job.classes)}
    schema = regional.features(job.classes, job.listed)
    left, changed = Rejected(), Rejected()
    counts = dict.fromkeys(("examples", "bytes", "captions", *COUNTED), 0)
    with storage.new_file(storage.folder(job.part)) as file:
        writer = ArrayRecordWriter(file, "group_size:1")
        try:
            for row, path, why in storage.read_json(storage.folder(job.part + ".items.json")):
                item = regional.from_plain(row)
                try:
                    data = _image(item, path, why, job.data_dir)
                    example = regional.to_example(item, data, job.source, labels, job.rules, left, changed, job.listed)
                except RejectedError as e:
                    left.count(str(e), (item.id or item.image)[:SHOWN])
                    continue
                record = schema.serialize_example(schema.encode_example(example))
                # A map's order is by chance; the same input shall give the same file.
                record = tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)
                writer.write(record)
                counts["examples"] += 1
                counts["bytes"] += len(record)
                counts["captions"] += len(example["text"])
                for what in COUNTED:
                    counts[what] += len(example[what])
        finally:
            writer.close()
    storage.replace_text(
        storage.folder(job.part + ".json"), json.dumps(counts | {"rejected": left, "changed": changed})
    )


_opened = functools.lru_cache(maxsize=4)(functools.partial(sources.open_source, features=("image",)))
_RECORD = re.compile(r"(.*):([^:#]*)#(\d+)", re.DOTALL)
_MEMBER = re.compile(r"(.*\.tar)#(\d+)\+(\d+)/.*", re.DOTALL)
"""What `grit` calls an image: where it lies in which tar, and its name."""


def _image(item: Annotated, path: str, why: str, data_dir: str) -> bytes:
    """The encoded image.

    Raises:
      RejectedError: there is none.
    """
    if item.binary:
        try:
            return base64.b64decode(item.binary, validate=True)
        except (binascii.Error, ValueError) as e:
            raise RejectedError("image is not base64") from e
    if why:
        raise RejectedError(why)
    if match := _RECORD.fullmatch(path):
        return _opened(match[1], match[2], data_dir)[int(match[3])]["image"]
    try:
        if match := _MEMBER.fullmatch(path):
            with epath.Path(match[1]).open("rb") as file:
                file.seek(int(match[2]))
                return file.read(int(match[3]))
        return epath.Path(path).read_bytes()
    except OSError as e:
        if storage.passes(e):
            raise
        raise RejectedError("file missing") from e


def _finish(folder: epath.Path, name: str, jobs, left, items, classes, evaluations, named_in: str | None) -> None:
    """Report and metadata; the data set appears."""
    format, listed = jobs[0][1].source, jobs[0][1].listed
    made: dict[str, list[Shard]] = {split: [] for split in items}
    report: dict[str, dict[str, Any]] = {}
    for split, job in jobs:
        part = storage.read_json(storage.folder(job.part + ".json"))
        made[split].append(Shard(storage.folder(job.part), part["examples"], part["bytes"]))
        total = report.setdefault(split, {"changed": Rejected()})
        for key, value in part.items():
            if key == "rejected":
                left[split].add(value)
            elif key == "changed":
                total["changed"].add(value)
            elif key != "bytes":
                total[key] = total.get(key, 0) + value
    for split, rows in made.items():
        if not any(shard.examples for shard in rows):
            hint = " Are the images in --files?" if "file missing" in left[split] else ""
            _nothing_in(f"Split {split!r} of {name!r} has no example", left[split], jobs, hint)
    if not any(report[split]["boxes"] for split in made):
        _nothing_in(f"No image of {name!r} has a box", left["train"] if "train" in left else Rejected(), jobs)
    for split, rejected in left.items():
        if split in report or rejected:
            own = report.setdefault(split, {"examples": 0, "changed": Rejected()})
            own["changed"] = _shown(own["changed"])
            own["rejected"] = _shown(rejected)
    if "train" in report:
        report["train"]["evaluations"] = [e.name for e in evaluations]
        if FORMATS[format].leaks:
            unknown = sum(not item.coco_id for item in items["train"])
            report["train"]["images whose number in COCO is unknown"] = unknown
    for split, rows in items.items():
        if split != "train" and (others := leaks.trained_on(str(folder.parent.parent), rows)):
            report[split]["images that are trained on in"] = others
    files = {"report.json": json.dumps(report, indent=1), leaks.IMAGES: json.dumps(leaks.listing(items, named_in))}
    if classes:
        rows = [{"name": own} | told for own, told in classes.items()]
        files[CLASSES] = json.dumps(rows, ensure_ascii=False, indent=1)
    schema = regional.features(list(classes), listed)
    publish(folder, name, schema, made, f"Regions of {format}, prepared by capvl.", files)


def _nothing_in(what: str, rejected: Rejected, jobs, hint: str = "") -> None:
    """Raises UserError; the parts go, as another start would find the same."""
    storage.folder(jobs[0][1].part).parent.rmtree()
    reasons = ", ".join(f"{n} x {reason}" for reason, (n, _) in rejected.items()) or "nothing"
    raise UserError(f"{what}; left out: {reasons}.{hint}")


def _shown(rejected: Rejected) -> dict[str, dict[str, Any]]:
    return {reason: {"count": n, "first": first} for reason, (n, first) in rejected.items()}
