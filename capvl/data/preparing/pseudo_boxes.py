"""Boxes for captions by a teacher: a prepared data set with captions -> lines of ODVG, here or on Apache Beam.

GLIP (arXiv 2112.03857, section 3.3) trains on such boxes of web captions. A part that is finished is never made again,
so a killed job goes on where it stopped. A line is

    {"filename": "NAME:SPLIT#NUMBER", "height": H, "width": W, "grounding": {"caption": C, "regions":
      [{"bbox": [x0, y0, x1, y1] in pixels, "phrase": C[start:end], "tokens_positive": [[start, end]], "score": S}]}}

and `prepare regions --format=odvg --min_score=…` makes a data set of them, with the images of the one that was read.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from capvl import storage
from capvl.data.images.decode import BadImageError, decode, image_size
from capvl.data.preparing.region_sets import claim
from capvl.data.preparing.regional import Corners, says_something
from capvl.data.reading import sources
from capvl.data.reading.rejected import Rejected
from capvl.errors import UserError

EACH = 1000
"""Records of a part."""


class Found(NamedTuple):
    """A box that a teacher found for characters `start` to `end` of a caption, in fractions; score of 0 to 1."""

    box: Corners
    start: int
    end: int
    score: float


Teacher = Callable[[Sequence[bytes], Sequence[str]], Sequence[Sequence[Found]]]
"""(encoded images, a caption of each) -> what it finds for each caption."""


class Job(NamedTuple):
    """One part: the lines of records `first` to `end` go to `part`."""

    part: str
    data: str
    split: str
    data_dir: str
    first: int
    end: int
    load: Callable[[str], Teacher]
    model: str
    batch: int
    min_score: float


def write(
    data: str,
    split: str,
    out: str,
    data_dir: str,
    load: Callable[[str], Teacher],
    model: str,
    *,
    batch: int = 16,
    min_score: float = 0.0,
    beam: list[str] | None = None,
) -> dict[str, Any]:
    """Writes the lines of a split.

    Args:
      data, split, data_dir: of a prepared data set with captions.
      out: path of the lines; parts lie beside it.
      load: makes the teacher, once in each process; a function of a module, so that workers find it.
      model: what `load` gets: where the teacher is.
      batch: captions at a time.
      min_score: of boxes that are written.
      beam: options of Apache Beam, to run there; None for here.

    Returns:
      counts of `captions` (lines), `boxes`, and `rejected`: reason -> (count, first names).

    Raises:
      UserError: the data set is unknown, `out` is there, or an unfinished job beside it is another one.
    """
    if batch < 1 or not 0 <= min_score <= 1:
        raise UserError(f"batch={batch} must be at least 1, and min_score={min_score:g} between 0 and 1.")
    if not split.isidentifier():  # Names of records have it.
        raise UserError(f"split={split!r} should be the name of a whole split, such as 'train'.")
    target = storage.folder(out)
    if target.exists():
        raise UserError(f"{out!r} is already there; remove it to make it anew.")
    size = len(sources.open_source(data, split, data_dir, features=("image", "text")))
    parts = target.with_name(target.name + ".parts")
    storage.make_folder(parts)
    claim(parts / "plan.json", json.dumps([data, split, size, model, EACH, min_score]))
    jobs = []
    for i, first in enumerate(range(0, size, EACH)):
        of_part = str(parts / f"{i:05d}"), data, split, data_dir, first, min(first + EACH, size)
        jobs.append(Job(*of_part, load, model, batch, min_score))
    if beam is None:
        for job in jobs:
            write_part(job)
    else:
        from capvl.data.preparing.beam import map_on_beam  # Optional, and slow to import.

        map_on_beam(write_part, jobs, beam)
    return _finish(target, parts, jobs)


def _finish(target, parts, jobs: list[Job]) -> dict[str, Any]:
    counts: dict[str, Any] = {"captions": 0, "boxes": 0, "rejected": Rejected()}
    with storage.new_file(target) as file, open(file, "wb") as lines:
        for job in jobs:
            told = storage.read_json(storage.folder(job.part + ".json"))
            counts["rejected"].add(told["rejected"])
            for what in ("captions", "boxes"):
                counts[what] += told[what]
            lines.write(storage.folder(job.part).read_bytes())
    parts.rmtree()
    return counts


_teacher = functools.lru_cache(maxsize=1)(lambda load, model: load(model))
_source = functools.lru_cache(maxsize=1)(functools.partial(sources.open_source, features=("image", "text")))


def write_part(job: Job) -> None:
    """Writes the lines of a part and, last, its counts; does nothing where these are there.

    Raises:
      UserError: storage failed again and again.
    """
    if not storage.folder(job.part + ".json").exists():
        storage.retry(_write_part, job, what=f"Finding boxes for {job.part!r}")


def _write_part(job: Job) -> None:
    teacher = _teacher(job.load, job.model)
    left, lines, boxes = Rejected(), [], 0
    captions = _captions(job, left)
    while asked := list(itertools.islice(captions, job.batch)):
        found = teacher([image for *_, image, _ in asked], [text for *_, text in asked])
        for (name, size, _, text), own in zip(asked, found, strict=True):
            kept = [row for row in own if row.score >= job.min_score]
            if kept:
                lines.append(line(name, size, text, kept))
                boxes += len(kept)
            else:
                left.count("caption without a box", name)
    storage.replace_text(storage.folder(job.part), "".join(own + "\n" for own in lines))
    told = {"captions": len(lines), "boxes": boxes, "rejected": left}
    storage.replace_text(storage.folder(job.part + ".json"), json.dumps(told))


def _captions(job: Job, left: Rejected) -> Iterator[tuple[str, tuple[int, int], bytes, str]]:
    """(name, (height, width), encoded image, caption) of the captions of a part."""
    source = _source(job.data, job.split, job.data_dir)
    for number in range(job.first, job.end):
        record, name = source[number], f"{job.data}:{job.split}#{number}"
        try:
            size = image_size(record["image"])
            decode(record["image"], 32, 32)  # A truncated one has a size, too.
        except BadImageError:
            left.count("undecodable image", name)
            continue
        for text in map(sources.as_text, record["text"]):
            if says_something(text):
                yield name, size, record["image"], text


def line(name: str, size: tuple[int, int], caption: str, found: Sequence[Found]) -> str:
    """A line of ODVG; see the module.

    Args:
      name: of the image.
      size: (height, width) of the upright image.
      caption: that was grounded.
      found: its boxes.
    """
    height, width = size
    regions = [
        {
            "bbox": [round(v * s, 2) for v, s in zip(row.box, (width, height, width, height), strict=True)],
            "phrase": caption[row.start : row.end],
            "tokens_positive": [[row.start, row.end]],
            "score": round(float(row.score), 4),
        }
        for row in found
    ]
    told = {"filename": name, "height": height, "width": width, "grounding": {"caption": caption, "regions": regions}}
    return json.dumps(told, ensure_ascii=False)
