"""A page of sample pictures of a prepared data set, with boxes and phrases drawn: whether the data is right, a person
sees at once. And region data sets written out as ODVG.
"""

import base64
import collections
import html
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

from capvl import storage
from capvl.data.images.decode import BadImageError, decode, resize
from capvl.data.images.drawing import COLORS, draw_boxes, sheet
from capvl.data.preparing import region_lines
from capvl.data.randomness import Uniforms
from capvl.data.reading import sources
from capvl.data.reading.regions import DETECTION, FEATURES, Region, categories, crowds, looked_for, regions
from capvl.data.reading.sources import as_text
from capvl.errors import UserError

COUNTED = 2000
"""Records at most that the table is counted over."""
LEAST, MOST = 360, 640
"""Pixels of a drawn picture's long side: small images are enlarged, so that names can be read."""
COLUMNS = 4
IGNORED = (128, 128, 128)
"""Crowds: nothing is learned from them, and they don't count."""
JPEG = b"\xff\xd8"
"""How these begin; of other kinds the name says PNG, and readers look at the bytes."""


def look(name: str, split: str, count: int, out: str, data_dir: str, seed: int = 0) -> tuple[str, str]:
    """Writes a page, and its pictures on one sheet (PNG) beside it.

    Args:
      name, split, data_dir: of the data set.
      count: pictures, drawn by `seed`.
      out: path of the page; the sheet's name ends in .png instead.

    Returns:
      Both paths.

    Raises:
      UserError: the data set is unknown, `count` or `out` makes no sense, or the page can't be written.
    """
    if count < 1:
        raise UserError(f"--count must be at least 1, not {count}.")
    if out.lower().endswith(".png"):
        raise UserError(f"--out={out} names the page, such as page.html; the sheet is written beside it as a PNG.")
    source = sources.open_source(
        name, split, data_dir, features=("image", "text?", "image_id?", "key?", *FEATURES, *DETECTION)
    )
    uniforms, numbers = Uniforms(seed, 0), list(range(len(source)))
    chosen = sorted(numbers.pop(uniforms.below(len(numbers))) for _ in range(min(count, len(source))))
    cards, pictures = [], []
    for number in chosen:
        record = source[number]
        found, ignored = regions(record), crowds(record)
        try:
            picture = picture_of(record, found, ignored)
        except BadImageError as e:
            raise UserError(f"Record {number} of {name!r} has an image that can't be read: {e}") from e
        pictures.append(picture)
        cards.append(_card(record, number, found, ignored, picture))
    page = storage.folder(out)
    storage.replace_text(page, _page(name, split, cards, _table(source), _left_out(source, split)))
    other = page.with_name(pathlib.PurePath(page.name).stem + ".png")
    storage.replace_bytes(other, _encoded(sheet(pictures, COLUMNS), "PNG"))
    return str(page), str(other)


def name_of(region: Region) -> str:
    """What is written at a box: its first phrase, else its class with its attributes."""
    return region.phrases[0] if region.phrases else " ".join((*region.attributes, region.category))


def colors(found: Sequence[Region]) -> list[tuple[int, int, int]]:
    """One of each name: boxes of one phrase look alike."""
    numbers: dict[tuple, int] = {}
    for region in found:
        numbers.setdefault((region.phrases, region.category, region.spans), len(numbers))
    return [COLORS[numbers[r.phrases, r.category, r.spans] % len(COLORS)] for r in found]


def picture_of(record: dict[str, Any], found: Sequence[Region], ignored: Sequence[Region] = ()) -> np.ndarray:
    """(H, W, 3) uint8: the image with its regions, and crowds in grey.

    Raises:
      BadImageError: it can't be read.
    """
    pixels = decode(record["image"])
    side = max(pixels.shape[:2])
    factor = LEAST / side if side < LEAST else MOST / side if side > MOST else 1.0
    height, width = (max(1, round(s * factor)) for s in pixels.shape[:2])
    if factor > 1:
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)
    else:
        pixels = resize(pixels, height, width)
    names = [f"({name_of(r)})" for r in ignored] + [name_of(r) for r in found]
    shades = [IGNORED] * len(ignored) + colors(found)
    return draw_boxes(pixels, [r.box for r in (*ignored, *found)], names, shades)


def _encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=88)
    return buffer.getvalue()


def _marked(caption: str, number: int, found: Sequence[Region], shades) -> str:
    """A caption in HTML, with what names a region in its colour."""
    spans = {span[1:]: shade for region, shade in zip(found, shades, strict=True) for span in region.spans
             if span[0] == number}  # fmt: skip
    text, last = "", 0
    for (start, end), shade in sorted(spans.items()):
        if start < last or end > len(caption):
            continue
        said = html.escape(caption[start:end])
        text += html.escape(caption[last:start]) + f'<b style="color:rgb{shade}">{said}</b>'
        last = end
    return text + html.escape(caption[last:])


def _card(
    record: dict[str, Any], number: int, found: Sequence[Region], ignored: Sequence[Region], picture: np.ndarray
) -> str:
    shades, name = colors(found), as_text(record.get("image_id", "") or record.get("key", "") or number)
    data = base64.b64encode(_encoded(picture, "JPEG")).decode()
    texts = "".join(f"<li>{_marked(as_text(t), i, found, shades)}</li>" for i, t in enumerate(record.get("text", ())))
    rows = []
    several = [*zip(found, shades, strict=True), *((crowd, IGNORED) for crowd in ignored)]
    for i, (region, shade) in enumerate(several):
        said = "; ".join(region.phrases) or "–"
        more = ", ".join(region.attributes) if i < len(found) else "crowd"
        kind = f"{region.category} ({region.label})" if region.label >= 0 else region.category
        box = " ".join(f"{v:.3f}" for v in region.box)
        cells = "".join(f"<td>{html.escape(c)}</td>" for c in (said, kind, more, box))
        rows.append(f'<tr><td style="background:rgb{shade}">&nbsp;</td>{cells}</tr>')
    heads = "<tr><th></th><th>phrases</th><th>class</th><th>attributes</th><th>box</th></tr>"
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{html.escape(name)}"><figcaption>'
        f"<p>{number}: {html.escape(name)}</p><ol>{texts}</ol><details><summary>{_counted(found, ignored)}</summary>"
        f"<table>{heads}{''.join(rows)}</table></details></figcaption></figure>"
    )


def _counted(found: Sequence[Region], ignored: Sequence[Region]) -> str:
    return f"{len(found)} boxes" + (f" and {len(ignored)} crowds" if ignored else "")


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, middle, high = np.percentile(values, (0, 50, 100))
    return f"{np.mean(values):.2f} (least {low:g}, middle {middle:g}, most {high:g})"


def _table(source) -> list[tuple[str, str]]:
    """Counts over the first COUNTED records."""
    many = min(len(source), COUNTED)
    wanted = ("text?", *FEATURES, *DETECTION)
    boxes, phrases, words, areas, captions, kinds, crowded = [], [], [], [], [], collections.Counter(), 0
    for i in range(many):
        record = source.read(i, wanted) if wanted else {}
        found = regions(record)
        boxes.append(len(found))
        crowded += len(crowds(record))
        captions.append(len(record.get("text", ())))
        for region in found:
            phrases.append(len(region.phrases))
            words += [len(p.split()) for p in region.phrases]
            areas.append((region.box[2] - region.box[0]) * (region.box[3] - region.box[1]))
            kinds[region.category or "–"] += 1
    shown = ", ".join(f"{name} {n:,}" for name, n in kinds.most_common(15))
    of = f" (of the first {many:,})" if many < len(source) else ""
    return [
        ("images", f"{len(source):,}"),
        (f"boxes an image{of}", _spread(boxes)),
        ("images without a box", f"{boxes.count(0):,}"),
        ("crowds (boxes of several, or difficult: ignored)", f"{crowded:,}"),
        ("captions an image", _spread(captions)),
        ("phrases a box", _spread(phrases)),
        ("words a phrase", _spread(words)),
        ("a box's share of its image", _spread([round(a, 4) for a in areas])),
        ("classes", f"{len(categories(source)):,}; most often: {shown}"),
    ]


def _left_out(source, split: str) -> list[tuple[str, str, str]]:
    """(what, count, first names) by the report beside the data set, if it has one."""
    file = storage.folder(str(source.info.data_dir)) / "report.json" if hasattr(source.info, "data_dir") else None
    if file is None or not file.exists():
        return []
    entry = storage.read_json(file).get(split.partition("[")[0], {})
    rows = []
    for kind, title in (("rejected", "left out"), ("changed", "changed")):
        for reason, told in sorted(entry.get(kind, {}).items(), key=lambda item: -item[1]["count"]):
            rows.append((f"{title}: {reason}", f"{told['count']:,}", " ".join(told["first"])))
    return rows


def _page(name: str, split: str, cards: list[str], table, left_out) -> str:
    def rows(values):
        return "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in values)

    title = html.escape(f"{name}, {split}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>'
        "body{font-family:sans-serif;margin:1em}figure{display:inline-block;vertical-align:top;margin:.5em;"
        "max-width:660px}img{max-width:100%}figcaption{font-size:85%}table{border-collapse:collapse;font-size:90%}"
        "td,th{border:1px solid #ccc;padding:2px 6px;text-align:left}</style></head><body>"
        f"<h1>{title}</h1><table>{rows(table)}</table>"
        + (f"<h2>Left out and changed</h2><table>{rows(left_out)}</table>" if left_out else "")
        + f"<h2>{len(cards)} pictures</h2>{''.join(cards)}</body></html>\n"
    )


def write_odvg(name: str, split: str, out: str, data_dir: str, images: str = "") -> dict[str, int]:
    """Writes a region data set as ODVG: a line of grounding for each caption that names regions, and a line of
    detections for each image with boxes of a class that has a label, or that was searched for all classes and has
    none; `out`.labels.json says these.

    Args:
      name, split, data_dir: of the data set.
      out: path of the lines.
      images: a folder that the images are written to; "" where they lie where their annotations found them.

    Returns:
      How many lines of each kind.

    Raises:
      UserError: it is unknown, no region data set, or can't be written.
    """
    wanted = ("file_name", "height", "width", "text", "boxes", "phrases", "attributes?", *DETECTION)
    source = sources.open_source(name, split, data_dir, features=("image",))
    folder = storage.folder(images) if images else None
    if folder is not None:
        storage.make_folder(folder)
    names = {category: label for label, category in enumerate(categories(source))}
    lines, counts = [], {"detection": 0, "grounding": 0}
    for i in range(len(source)):
        record = source.read(i, wanted)
        if folder is not None:
            data = source[i]["image"]
            record["file_name"] = f"{split}-{i:07d}.{'jpg' if data[:2] == JPEG else 'png'}"
            storage.replace_bytes(folder / record["file_name"], data)
        elif "#" in as_text(record["file_name"]) or not record["file_name"]:
            raise UserError(f"The images of {name!r} are no files of their own; write them with --images=FOLDER.")
        found = regions(record)
        # A data set has such an image only where it was searched; LVIS searches for some classes only.
        empty = "crowds" in record and not found and not crowds(record) and looked_for(record) is None
        if any(region.category in names for region in found) or (names and empty):
            lines.append(region_lines.odvg_line(record, None, names))
            counts["detection"] += 1
        for number in sorted({span[0] for region in found for span in region.spans}):
            lines.append(region_lines.odvg_line(record, number, names))
            counts["grounding"] += 1
    if not lines:
        raise UserError(f"Split {split!r} of {name!r} has neither boxes with labels nor phrases in captions for ODVG.")
    file = storage.folder(out)
    storage.replace_text(file, "\n".join(lines) + "\n")
    if names:
        labels = json.dumps({str(label): category for category, label in names.items()}, ensure_ascii=False, indent=1)
        storage.replace_text(file.with_name(file.name + ".labels.json"), labels)
    return counts
