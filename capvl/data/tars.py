"""img2dataset / WebDataset tars -> a tfds data set in ArrayRecord files.

Each tar becomes one shard, in parallel processes. A shard that is finished is never made
again, so a killed preparation goes on where it stopped; the data set appears under its name
only when all shards are there. What is rejected is counted by reason.
"""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
from typing import Any

from capvl import storage
from capvl.data.decode import BadImageError, decode, image_size
from capvl.data.streams import IMAGE_SUFFIXES, expand
from capvl.errors import UserError

VERSION = "1.0.0"
NAMED_PER_REASON = 5


class RejectedError(Exception):
    """A sample that is left out; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is let in: shorter side in pixels, longer / shorter side, bytes of one member."""

    min_side: int = 16
    max_aspect: float = 8.0
    max_bytes: int = 64_000_000


def features():
    """The schema: image, captions, label, boxes, phrases, and the whole JSON."""
    import numpy as np
    import tensorflow_datasets as tfds

    text, integer = tfds.features.Text, np.int64
    return tfds.features.FeaturesDict(
        {
            "key": text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "text": tfds.features.Sequence(text()),
            "label": integer,
            "class_name": text(),
            # Boxes and phrases of one `chain` are about one entity.
            "boxes": tfds.features.Sequence(
                {"bbox": tfds.features.BBoxFeature(), "chain": text(), "label": integer, "category": text()}
            ),
            "phrases": tfds.features.Sequence(
                {"phrase": text(), "chain": text(), "sentence": integer, "first_word": integer, "num_words": integer}
            ),
            "json": text(),
        }
    )


def to_example(key: str, members: dict[str, bytes], limits: Limits) -> dict[str, Any]:
    """One sample in the schema.

    Args:
      key: its name in the tar.
      members: suffix -> bytes.
      limits: what is let in.

    Raises:
      RejectedError: with the reason.
    """
    image = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
    if image is None:
        raise RejectedError("no image")
    height, width = _check_image(image, limits)
    try:
        meta = json.loads(members.get("json", b"{}"))
    except ValueError as e:
        raise RejectedError("unreadable JSON") from e
    if not isinstance(meta, dict):
        raise RejectedError("unreadable JSON")
    try:
        text = members.get("txt", b"").decode("utf-8").strip()
    except UnicodeDecodeError as e:
        raise RejectedError("text is not UTF-8") from e
    captions = [c.strip() for c in meta.get("captions") or [] if isinstance(c, str) and c.strip()] or [text]
    if not captions[0]:
        raise RejectedError("empty text")
    return {
        "key": key,
        "image": image,
        "text": captions,
        "label": int(meta["label"]) if isinstance(meta.get("label"), int) else -1,
        "class_name": str(meta.get("class_name") or ""),
        "boxes": list(_boxes(meta, height, width)),
        "phrases": [
            dict(sentence=int(s), first_word=int(f), num_words=int(n), chain=str(c), phrase=str(p))
            for s, f, n, c, _, p in meta.get("phrases") or []
        ],
        "json": json.dumps(meta, ensure_ascii=False),
    }


def _check_image(image: bytes, limits: Limits) -> tuple[int, int]:
    try:
        height, width = image_size(image)
        if min(height, width) < limits.min_side:
            raise RejectedError("image too small")
        if max(height, width) > limits.max_aspect * min(height, width):
            raise RejectedError("extreme aspect ratio")
        decode(image)
    except BadImageError as e:
        reason = str(e)
        if "bomb" in reason:
            raise RejectedError("decompression bomb") from e
        raise RejectedError("truncated image" if "truncated" in reason else "undecodable image") from e
    return height, width


def _boxes(meta: dict, height: int, width: int):
    """Rows of the `boxes` feature, from a list with labels or a dict by chain; pixels -> fractions."""
    import tensorflow_datasets as tfds

    rows = meta.get("boxes") or []
    if isinstance(rows, dict):
        rows = [(box, chain, -1, "") for chain, boxes in rows.items() for box in boxes]
    else:
        labels = meta.get("labels") or [-1] * len(rows)
        names = meta.get("category_names") or [""] * len(rows)
        rows = [(box, str(i), labels[i], names[i]) for i, box in enumerate(rows)]
    for (x0, y0, x1, y1), chain, label, category in rows:
        fractions = [min(max(v, 0.0), 1.0) for v in (y0 / height, x0 / width, y1 / height, x1 / width)]
        yield {"bbox": tfds.features.BBox(*fractions), "chain": chain, "label": int(label), "category": category}


def write_shard(tar: str, part: str, limits: Limits, excluded: frozenset[str] = frozenset()) -> dict:
    """Writes one tar's shard `part` and its report `part`.json; both appear only when whole.

    Returns:
      The report: number of examples and bytes, keys, and rejected (reason -> count and names).
    """
    return storage.retry(_write_shard, tar, part, limits, excluded, what=f"Reading {tar!r}")


def _write_shard(tar: str, part: str, limits: Limits, excluded: frozenset[str]) -> dict:
    from array_record.python.array_record_module import ArrayRecordWriter

    schema = features()
    temporary = f"{part}.{os.getpid()}.tmp"
    rejected: dict[str, list] = collections.defaultdict(lambda: [0, []])
    keys: dict[str, None] = {}
    size = 0
    writer = ArrayRecordWriter(temporary, "group_size:1")
    try:
        for key, members in _samples(tar, rejected, limits):
            try:
                if key in keys or key in excluded:
                    raise RejectedError("duplicate key")
                record = schema.serialize_example(schema.encode_example(to_example(key, members, limits)))
            except RejectedError as e:
                _count(rejected, str(e), key)
                continue
            keys[key] = None
            size += len(record)
            writer.write(record)
    finally:
        writer.close()
    report = {"tar": tar, "examples": len(keys), "bytes": size, "keys": list(keys), "rejected": dict(rejected)}
    os.replace(temporary, part)
    pathlib.Path(temporary).write_text(json.dumps(report))
    os.replace(temporary, part + ".json")
    return report


def _count(rejected: dict, reason: str, key: str) -> None:
    rejected[reason][0] += 1
    if len(rejected[reason][1]) < NAMED_PER_REASON:
        rejected[reason][1].append(key)


def _samples(tar: str, rejected: dict, limits: Limits):
    """(key, members) of a tar; unsafe paths and oversized members are rejected before they are read."""
    import tarfile

    from etils import epath

    key, members, bad = None, {}, ""
    try:
        with epath.Path(tar).open("rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                path = pathlib.PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    _count(rejected, "path climbs out", member.name)
                    continue
                stem, _, suffix = path.name.partition(".")
                stem = str(path.parent / stem)
                if stem != key:
                    if members and not bad:
                        yield key, members
                    elif bad:
                        _count(rejected, bad, key)
                    key, members, bad = stem, {}, ""
                if member.size > limits.max_bytes:
                    bad = "member too large"
                    continue
                members[suffix.lower()] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as e:
        if isinstance(e, FileNotFoundError):
            raise UserError(f"Tar {tar!r} is missing.") from e
        if storage.passes(e):
            raise
        _count(rejected, "tar cut short", tar)
    if members and not bad:
        yield key, members


def prepare(
    name: str, splits: dict[str, str], data_dir: str, *, limits: Limits | None = None, workers: int = 0
) -> pathlib.Path:
    """Prepares a data set from tars.

    Args:
      name: of the data set to make.
      splits: split -> pattern of its tars.
      data_dir: where prepared data sets are.
      limits: what is let in.
      workers: processes; 0 for one a core.

    Returns:
      The data set's folder; it holds `report.json`.

    Raises:
      UserError: no tars, no examples, or a data set of that name made from other tars.
    """
    limits = limits or Limits()
    folder = pathlib.Path(data_dir, name, VERSION)
    if folder.exists():
        raise UserError(f"Data set {name!r} is already prepared in {folder}; remove that folder to make it anew.")
    jobs = {(split, i): tar for split, p in splits.items() for i, tar in enumerate(expand(p))}
    parts = pathlib.Path(data_dir, name, "incomplete")
    parts.mkdir(parents=True, exist_ok=True)
    _check_plan(parts, jobs, limits)
    reports = _run(jobs, parts, limits, workers)
    reports |= _drop_duplicates(jobs, parts, limits, reports)
    _finish(name, folder, parts, splits, reports)
    return folder


def _check_plan(parts: pathlib.Path, jobs: dict, limits: Limits) -> None:
    """Refuses to mix shards of two plans."""
    plan = json.dumps([[f"{s}-{i}", t] for (s, i), t in jobs.items()] + [dataclasses.astuple(limits)])
    file = parts / "plan.json"
    if file.exists() and file.read_text() != plan:
        raise UserError(f"{parts} holds an unfinished preparation of other tars or limits; remove it to begin anew.")
    file.write_text(plan)


def _part(parts: pathlib.Path, split: str, index: int) -> str:
    return str(parts / f"{split}-{index:05d}")


def _run(jobs: dict, parts: pathlib.Path, limits: Limits, workers: int) -> dict:
    """All shards' reports, making those that are missing."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    reports, missing = {}, {}
    for (split, i), tar in jobs.items():
        report = pathlib.Path(_part(parts, split, i) + ".json")
        if report.exists():
            reports[split, i] = json.loads(report.read_text())
        else:
            missing[split, i] = tar
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "shards", TimeRemainingColumn())
    spawn = multiprocessing.get_context("spawn")
    workers = min(workers or os.cpu_count() or 1, max(len(missing), 1))
    with Progress(*columns) as progress, concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        task = progress.add_task("preparing", total=len(jobs), completed=len(reports))
        futures = {pool.submit(write_shard, tar, _part(parts, *job), limits): job for job, tar in missing.items()}
        for future in concurrent.futures.as_completed(futures):
            reports[futures[future]] = future.result()
            progress.advance(task)
    return reports


def _drop_duplicates(jobs: dict, parts: pathlib.Path, limits: Limits, reports: dict) -> dict:
    """Makes those shards again that hold a key which an earlier shard of the split has."""
    seen: dict[str, set] = collections.defaultdict(set)
    again = {}
    for split, i in jobs:
        twice = seen[split].intersection(reports[split, i]["keys"])
        if twice:
            part = _part(parts, split, i)
            again[split, i] = write_shard(jobs[split, i], part, limits, frozenset(twice))
        seen[split].update(reports[split, i]["keys"])
    return again


def _finish(name: str, folder: pathlib.Path, parts: pathlib.Path, splits: dict, reports: dict) -> None:
    """Gives shards their final names, writes tfds' metadata and the report, and shows the folder."""
    import tensorflow_datasets as tfds

    staging = folder.with_name(VERSION + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    infos = []
    for split in list(splits):
        own = [reports[key] for key in sorted(reports) if key[0] == split]
        if not sum(r["examples"] for r in own):
            raise UserError(f"Split {split!r} of {name!r} has no example left; rejected: {totals(own)}.")
        template = tfds.core.ShardedFileTemplate(
            data_dir=str(staging), dataset_name=name, split=split, filetype_suffix="array_record"
        )
        for i in range(len(own)):
            os.link(_part(parts, split, i), template.sharded_filepath(shard_index=i, num_shards=len(own)))
        lengths = [r["examples"] for r in own]
        size = sum(r["bytes"] for r in own)
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template))
    tfds.folder_dataset.write_metadata(
        data_dir=str(staging),
        features=features(),
        split_infos=infos,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        description=f"Image-text pairs prepared by capvl from {len(reports)} tars.",
        check_data=False,
    )
    by_split = {s: [r for (split, _), r in sorted(reports.items()) if split == s] for s in splits}
    report = {
        split: {"examples": sum(r["examples"] for r in own), "rejected": totals(own)} for split, own in by_split.items()
    }
    (staging / "report.json").write_text(json.dumps(report, indent=1))
    staging.rename(folder)
    shutil.rmtree(parts)


def totals(reports: list[dict]) -> dict[str, dict]:
    """reason -> count and the first names, over shards."""
    out: dict[str, dict] = {}
    for report in reports:
        for reason, (count, names) in report["rejected"].items():
            entry = out.setdefault(reason, {"count": 0, "first": []})
            entry["count"] += count
            entry["first"] = (entry["first"] + names)[:NAMED_PER_REASON]
    return out
