"""Many shards of image-text pairs -> one tfds data set, in processes of this machine or on Apache Beam.

Each source file becomes one shard. A shard that is finished is never made again, so a killed
preparation goes on where it stopped; the data set appears under its name only when all shards
are there. What is left out is counted by reason, in `report.json` and on the data card.
"""

import collections
import concurrent.futures
import dataclasses
import importlib.util
import json
import multiprocessing
import os
from collections.abc import Callable

from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from capvl import storage
from capvl.data.preparing import shards
from capvl.data.preparing.filters import Filters
from capvl.data.preparing.jobs import Job, Plan, identities
from capvl.data.preparing.publish import VERSION, Shard, check_name, publish
from capvl.data.reading.patterns import expand
from capvl.data.reading.rejected import NAMED_PER_REASON, Rejected
from capvl.data.reading.samples import NO_NAMES, Names, columns, is_parquet
from capvl.errors import UserError


def prepare(
    name: str,
    splits: dict[str, str],
    data_dir: str,
    *,
    filters: Filters | None = None,
    frames: int = 0,
    names: Names = NO_NAMES,
    workers: int = 0,
    beam: list[str] | None = None,
) -> epath.Path:
    """Prepares a data set from tars or parquet files.

    Args:
      name: of the data set to make.
      splits: split -> pattern of its files.
      data_dir: where prepared data sets are; with Beam also a bucket.
      filters: what is let in.
      frames: of clips, of which so many are kept; 0 for images.
      names: of what holds the image and the captions, where their own names don't say it.
      workers: processes; 0 for one a core.
      beam: options of Apache Beam, to run there instead; None for here.

    Returns:
      The data set's folder; it holds `report.json` and `card.md`.

    Raises:
      UserError: a name that a data set can't have, no files, columns that don't say what they are, no examples, or a
        data set of that name made from other files.
    """
    check_name(name)
    filters = filters or Filters()
    filters.check()
    if beam is not None and not importlib.util.find_spec("apache_beam"):
        raise UserError("Preparing on Apache Beam needs it installed: pip install -e '.[beam]'.")
    folder = storage.folder(data_dir) / name / VERSION
    if folder.exists():
        raise UserError(f"Data set {name!r} is already prepared in {folder}; remove that folder to make it anew.")
    sources = {(split, i): path for split, p in splits.items() for i, path in enumerate(expand(p))}
    plan = Plan(name, sources, folder, storage.folder(data_dir) / name / "incomplete", filters, frames, names)
    taken = _columns(plan)
    _claim(plan)
    if beam is None:
        run_here(plan, workers)
    else:
        from capvl.data.preparing.beam import run_on_beam  # Optional, and slow to import.

        run_on_beam(plan, beam)
    _finish(plan, taken)
    return folder


def _columns(plan: Plan) -> dict[str, dict[str, str]]:
    """split -> what is taken from which column, by the first of its parquet files that can be read."""
    taken: dict[str, dict[str, str]] = {}
    for (split, _), path in plan.sources.items():
        if split in taken or not is_parquet(path):
            continue
        try:
            found = columns(path, plan.names)
        except UserError:
            raise
        except Exception:  # Who reads it counts it, with its reason.
            continue
        if not found.text:
            raise UserError(f"{path!r} has no column that is called as captions are; name it with --text=COLUMN.")
        taken[split] = {"image": found.image or ", ".join(found.films), "text": found.text}
    return taken


def _claim(plan: Plan) -> None:
    """Refuses to mix shards of two plans."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(storage.size, plan.sources.values()))
    text = json.dumps(
        [[f"{s}-{i}", path, size] for ((s, i), path), size in zip(plan.sources.items(), sizes, strict=True)]
        + [[*dataclasses.astuple(plan.filters), *((plan.frames,) if plan.frames else ())]]
        + ([dataclasses.astuple(plan.names)] if plan.names != NO_NAMES else [])
    )
    file = plan.parts / "plan.json"
    if file.exists() and storage.read_text(file) != text:
        raise UserError(
            f"{plan.parts} holds an unfinished preparation of other files or filters, or of files that have changed "
            f"since; remove it to begin anew."
        )
    storage.make_folder(plan.parts)
    storage.replace_text(file, text)


def run_here(plan: Plan, workers: int = 0) -> None:
    """Makes all parts in processes of this machine."""
    parts = [(source, plan.part(job)) for job, source in plan.sources.items()]
    missing = [p for p in parts if not storage.folder(p[1] + ".json").exists()]
    _in_processes(
        "preparing",
        [(shards.write_shard, *p, plan.filters, plan.frames, plan.names) for p in missing],
        len(parts),
        workers,
    )
    dropped = find_duplicates(plan)
    thin = [(shards.thin_shard, plan.part(job), numbers) for job, numbers in dropped.items()]
    _in_processes("leaving out duplicates", thin, len(thin), workers)


def _in_processes(title: str, calls: list[tuple[Callable, ...]], total: int, workers: int) -> None:
    if not calls:
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "shards", TimeRemainingColumn())
    spawn = multiprocessing.get_context("spawn")
    workers = min(workers or os.cpu_count() or 1, len(calls))
    with Progress(*columns) as progress, concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        task = progress.add_task(title, total=total, completed=total - len(calls))
        for future in concurrent.futures.as_completed([pool.submit(*call) for call in calls]):
            future.result()
            progress.advance(task)


def find_duplicates(plan: Plan) -> dict[Job, dict[int, str]]:
    """shard -> number of a record -> reason, of all records for which an earlier one of their split is the same."""
    seen: set[tuple[str, str, str]] = set()
    dropped: dict[Job, dict[int, str]] = collections.defaultdict(dict)
    for job in plan.sources:
        for number, row in enumerate(shards.read_rows(plan.part(job))):
            for identity in identities(job[0], row):
                if identity in seen:
                    dropped[job].setdefault(number, f"duplicate {identity[1]}")
                seen.add(identity)
    return dict(dropped)


def _finish(plan: Plan, taken: dict[str, dict[str, str]]) -> None:
    """Gives shards their final names, writes tfds' metadata, report and card, and shows the folder."""
    files = {job: shards.final(plan.part(job)) for job in plan.sources}
    reports = {job: shards.read_report(str(file)) for job, file in files.items()}
    totals = {split: _total([r for job, r in reports.items() if job[0] == split]) for split in plan.splits()}
    for split, total in totals.items():
        if not total["examples"]:
            rejected = ", ".join(f"{n} x {reason}" for reason, (n, _) in total["rejected"].items()) or "nothing"
            raise UserError(f"Split {split!r} of {plan.name!r} has no example left; rejected: {rejected}.")
    files_of = {split: _files_of(plan, reports, split) for split in totals}
    report = {
        split: {
            "examples": t["examples"],
            "rejected": {k: {"count": n, "first": f} for k, (n, f) in t["rejected"].items()},
            **({"files": files_of[split]} if files_of[split] else {}),
            **({"columns": taken[split]} if split in taken else {}),
        }
        for split, t in totals.items()
    }
    made = {
        split: [Shard(files[job], r["examples"], r["bytes"]) for job, r in reports.items() if job[0] == split]
        for split in totals
    }
    publish(
        plan.folder,
        plan.name,
        shards.features(plan.frames),
        made,
        f"Image-text pairs prepared by capvl from {len(reports)} files.",
        {"report.json": json.dumps(report, indent=1), "card.md": card(plan, totals)},
    )
    plan.parts.rmtree()


def _files_of(plan: Plan, reports: dict[Job, dict], split: str) -> dict[str, list[str]]:
    """reason -> the first files of a split of which something was left out for it."""
    files: dict[str, list[str]] = collections.defaultdict(list)
    for job, report in reports.items():
        for reason in report["rejected"] if job[0] == split else ():
            if len(files[reason]) < NAMED_PER_REASON:
                files[reason].append(plan.sources[job])
    return dict(files)


def _total(reports: list[dict]) -> dict:
    """The sum of shards' reports."""
    total = {"examples": 0, "bytes": 0, "rejected": Rejected()}
    histograms = {"short_side": collections.Counter(), "text_length": collections.Counter()}
    for report in reports:
        total["examples"] += report["examples"]
        total["bytes"] += report["bytes"]
        total["rejected"].add(report["rejected"])
        for name, counter in histograms.items():
            counter.update(report[name])
    return total | histograms


def card(plan: Plan, totals: dict[str, dict]) -> str:
    """The data card: where from, what was let in, how much, what was left out and why, how large."""
    lines = [f"# {plan.name}", "", f"Image-text pairs from {len(plan.sources)} files, prepared by capvl.", ""]
    lines += ["| filter | value |", "|---|---|"]
    for field in dataclasses.fields(plan.filters):
        value = getattr(plan.filters, field.name)
        if field.name == "blocklist":
            value = f"{len(value)} entries"
        lines.append(f"| {field.name} | {', '.join(value) if isinstance(value, tuple) else value} |")
    for split, total in totals.items():
        seen = total["examples"] + sum(n for n, _ in total["rejected"].values())
        lines += [
            "",
            f"## {split}",
            "",
            f"{total['examples']:,} examples of {seen:,} samples, {total['bytes']:,} bytes.",
            "",
        ]
        lines += ["| left out | count | share |", "|---|---|---|"]
        for reason, (n, _) in sorted(total["rejected"].items(), key=lambda item: (-item[1][0], item[0])):
            lines.append(f"| {reason} | {n:,} | {n / seen:.2%} |")
        for name, title in (("short_side", "short side in pixels"), ("text_length", "characters of text")):
            lines += ["", f"| {title} | examples |", "|---|---|"]
            for low in sorted(map(int, total[name])):
                lines.append(f"| {low:,} to {2 * low - 1:,} | {total[name][str(low)]:,} |")
    return "\n".join(lines) + "\n"
