"""Annotation files of captioning and question answering: one small adapter a format, all onto the same `Item`.

`FORMATS` is the index. An adapter gets the files of one split (or of all splits, where the file says which is whose)
and yields (split, Item); images are named, not read. Rows that are not as they should be, and those that find no
partner (a caption of an unknown image), are left out and counted (`capvl.data.reading.rows`). Ids match by
what they say.
"""

import os
import pathlib
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pydantic

from capvl.data.preparing.asked import gqa, textvqa, vizwiz, vqa
from capvl.data.preparing.films import msrvtt, msvd, vatex
from capvl.data.preparing.stated import nlvr2, snli_ve
from capvl.data.reading.rejected import Rejected
from capvl.data.reading.rows import (
    Asked,
    FormatError,
    Given,
    Id,
    Item,
    Items,
    Kind,
    Length,
    Name,
    Number,
    Row,
    Rows,
    Split,
    Text,
    Texts,
)
from capvl.data.reading.tsv import Tsv
from capvl.errors import UserError
from capvl.lines import parse_json

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read(format: str, files: Sequence[str], split: str, left: Rejected | None = None) -> list[tuple[str, Item]]:
    """All (split, item) of a format's files.

    Args:
      format: a key of FORMATS.
      files: as many as the format has; see FORMATS.
      split: of the items, where the files don't say.
      left: is told of what is left out.

    Raises:
      UserError: missing, unreadable, not of this format, or without anything that can be used.
    """
    adapter, names = FORMATS[format]
    left = Rejected() if left is None else left
    least = sum(not n.endswith("?") for n in names)
    if not least <= len(files) <= len(names):
        raise UserError(
            f"The format {format!r} has the files {','.join(names)} (? may be left out), not {','.join(files)}."
        )
    try:
        items = list(adapter(split, left, *files))
    except FormatError as e:
        raise UserError(f"{', '.join(files)} is not of the format {format!r}: {e}.") from e
    if not items:
        why = "; ".join(f"{p[0][0].upper()}{p[0][1:]}: {reason} ({n} x)" for reason, (n, p) in left.items())
        raise UserError(
            f"{', '.join(files)} is not of the format {format!r}, or has nothing to use: {why or 'no rows'}."
        )
    return items


class _Coco(Row):
    images: list[Any]
    annotations: list[Any] = []


class _CocoImage(Row):
    id: Id
    file_name: Text | None = None
    coco_url: Text | None = None


class _CocoCaption(Row):
    image_id: Id
    caption: Text
    is_rejected: bool | None = None


def coco(split: str, left: Rejected, path: str) -> Items:
    """COCO captions, nocaps, VizWiz captions: {"images": [{"id", "file_name"}],
    "annotations": [{"image_id", "caption"}]}.

    Rejected captions are left out; images without captions (test splits) stay.
    """
    rows, texts = Rows(path, left), defaultdict(list)
    values = rows.json(_Coco)
    images = {}
    for place, image in rows.of(_CocoImage, values.images, "image"):
        if image.id in images:
            left.count("image id is there twice", place)
        else:
            images[image.id] = image
    for place, row in rows.of(_CocoCaption, values.annotations, "annotation"):
        if row.is_rejected:
            continue
        if row.image_id not in images:
            left.count("caption of an unknown image", place)
        texts[row.image_id].append(row.caption)
    for key, image in images.items():
        yield split, Item(image.file_name or image.coco_url or key, key, tuple(texts[key]))


class _Images(Row):
    images: list[Any]


class _Sentence(Row):
    raw: Any


class _Karpathy(Row):
    filename: Text
    filepath: Kind = ""
    sentences: list[_Sentence]
    split: Split
    cocoid: Id | None = None
    imgid: Id | None = None


def karpathy(split: str, left: Rejected, path: str) -> Items:
    """Karpathy's dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json; restval belongs to train."""
    rows = Rows(path, left)
    for place, row in rows.of(_Karpathy, rows.json(_Images).images, "image"):
        name = str(pathlib.PurePosixPath(row.filepath, row.filename))
        own = {"restval": "train"}.get(row.split, row.split)
        texts = rows.texts((s.raw for s in row.sentences), place)
        yield own, Item(name, row.cocoid or row.imgid or "", texts)


class _Data(Row):
    data: list[Any]


class _TextCaps(Row):
    image_id: Id
    caption_str: Texts = []
    reference_strs: Texts = []


def textcaps(split: str, left: Rejected, path: str) -> Items:
    """TextCaps: {"data": [{"image_id", "caption_str" or "reference_strs"}]}, one row a caption or an image; the test
    split has neither."""
    rows, texts = Rows(path, left), defaultdict(list)
    for place, row in rows.of(_TextCaps, rows.json(_Data).data):
        texts[row.image_id] += rows.texts(row.reference_strs or row.caption_str, place)
    for image, captions in texts.items():
        yield split, Item(image, image, tuple(dict.fromkeys(captions)))


class _Regions(Row):
    id: Id
    regions: list[Any]


class _Region(Row):
    region_id: Id
    x: Number
    y: Number
    width: Length
    height: Length
    phrase: Text


def visual_genome(split: str, left: Rejected, path: str) -> Items:
    """Visual Genome's region descriptions, each an item: [{"id": image, "regions": [{"region_id", "x", "y", "width",
    "height", "phrase"}]}]."""
    rows = Rows(path, left)
    for _, image in rows.of(_Regions, rows.listed(), "image"):
        for _, row in rows.of(_Region, image.regions, f"image {image.id}, region"):
            region = (row.x, row.y, row.x + row.width, row.y + row.height)
            yield split, Item(image.id, row.region_id, (row.phrase,), region=region)


class _LineQuestion(Row):
    id: Id | None = None
    question: Text
    answers: Given = ()
    kind: Kind = ""


class _Line(Row):
    image: Id | None = None
    images: tuple[Id, Id] | None = None
    video: Id | None = None
    id: Id = ""
    text: Texts = []
    class_name: Name = ""
    split: Split | None = None
    questions: list[Any] | None = None

    @pydantic.model_validator(mode="after")
    def _named(self):
        if not (self.image or self.images or self.video):
            raise ValueError("image is missing")
        return self


def lines(split: str, left: Rejected, path: str) -> Items:
    """JSON lines of our own: {"image" (or "images", two of them, or "video"), "id", "text": [...], "class_name",
    "split", "questions": [{"id", "question", "answers": [...], "kind"}]}; all but the first may be left out.

    A row whose texts or questions are all unusable is left out.
    """
    rows = Rows(path, left)
    for number, (place, line) in enumerate(rows.lines()):
        try:
            row = rows.one(_Line, parse_json(line), place)
        except ValueError:
            left.count("is not JSON", place)
            continue
        if row is None:
            continue
        texts, asked = rows.texts(row.text, place, "text"), []
        for i, value in enumerate(row.questions or ()):
            if (q := rows.one(_LineQuestion, value, f"{place}, question {i}")) is not None:
                asked.append(Asked(q.id or f"{number}-{i}", q.question, q.answers, q.kind))
        if (row.text and not texts) or (row.questions and not asked):
            continue
        image, second = row.images or (row.image or row.video, "")
        item = Item(image, row.id, texts, tuple(asked), row.class_name, second=second)
        yield row.split or split, item


_NAMED = re.compile(rf"(.*?(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))}))\s*([\t, ])(.*)", re.IGNORECASE)
_PLAIN = re.compile(r"([^\t, ]+)([\t, ])(.*)")


def words(split: str, left: Rejected, path: str) -> Items:
    """Scene text: lines of an image's name and the word in it, with a tab, comma or space between; behind a comma the
    word may stand in quotes."""
    for place, line in Rows(path, left).lines():
        name, tab, word = line.partition("\t")
        if not tab and (match := _NAMED.fullmatch(line) or _PLAIN.fullmatch(line)):
            name, mark, word = match.groups()
            word = word.strip()
            if mark == "," and len(word) > 1 and word[0] == word[-1] == '"':
                word = re.sub(r'""|\\"', '"', word[1:-1])
        if not word.strip() or not name.strip():
            left.count("should be an image's name and a word", place)
            continue
        yield split, Item(name.strip(), text=(word.strip(),))


def folders(split: str, left: Rejected, path: str) -> Items:
    """Images in folders that are named as their classes."""
    root = pathlib.Path(path)
    if not root.is_dir():
        raise UserError(f"Folder {path!r} does not exist.")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("._"))
    if not files:
        raise UserError(f"Folder {path!r} has no images in it.")
    deep = any(file.parent != root for file in files)
    for file in files:
        if deep and file.parent == root:
            left.count("beside the classes' folders", str(file))
        elif str(file) != os.fsdecode(str(file).encode("utf-8", "replace")):
            left.count("name is not UTF-8", ascii(str(file)))
        else:
            yield split, Item(str(file), class_name=file.parent.name.replace("_", " "))


class _TsvCaption(Row):
    caption: Any


class _TsvQuestion(Row):
    question_id: Id
    question: Text
    answers: Given = ()


def tsv(split: str, left: Rejected, images: str, captions: str, questions: str = "") -> Items:
    """GIT's TSV files, aligned row by row: images, captions [{"caption"}] ("-" for none), questions
    [{"question_id", "question", "answers" or "answer"}]."""
    pictures = Tsv(images)
    texts = Tsv(captions) if captions != "-" else None
    asked = Tsv(questions) if questions else None
    for file in (texts, asked):
        if file is not None and len(file) != len(pictures):
            raise UserError(f"{file.path!r} has {len(file)} rows, and {images!r} has {len(pictures)}.")
    for i in range(len(pictures)):
        key = pictures[i][0]
        for file in (texts, asked):
            if file is not None and file[i][0] != key:
                raise UserError(f"Row {i} of {file.path!r} is of {file[i][0]!r}, that of {images!r} of {key!r}.")
        found, said = _tsv_rows(texts, i, _TsvCaption, left), _tsv_rows(asked, i, _TsvQuestion, left)
        if found is None or said is None:
            continue
        captions_of = Rows(captions, left).texts((row.caption for row in found), f"row {i}")
        questions_of = tuple(Asked(r.question_id, r.question, r.answers) for r in said)
        yield split, Item(f"{images}#{i}", key, captions_of, questions_of)


def _tsv_rows(file: Tsv | None, number: int, kind: type[Row], left: Rejected) -> list | None:
    """The rows of a row's JSON; None where it has none."""
    if file is None:
        return []
    rows = Rows(file.path, left)
    try:
        values = file.json(number)
    except UserError:
        left.count("row has no JSON in its second column", rows.place(f"row {number}"))
        return None
    values = values if isinstance(values, list) else [values]
    found = (rows.one(kind, value, rows.place(f"row {number}")) for value in values)
    return [row for row in found if row is not None]


# Format -> (adapter, its files). tfds itself has coco_captions, imagenet2012 with imagenet2012_fewshot, and webvid.
FORMATS = {
    "coco": (coco, ("captions.json",)),
    "karpathy": (karpathy, ("dataset.json",)),
    "nocaps": (coco, ("captions.json",)),
    "textcaps": (textcaps, ("captions.json",)),
    "visual_genome": (visual_genome, ("region_descriptions.json",)),
    "vqa": (vqa, ("questions.json", "annotations.json?")),
    "textvqa": (textvqa, ("questions.json",)),
    "vizwiz": (vizwiz, ("questions.json",)),
    "gqa": (gqa, ("questions.json",)),
    "snli_ve": (snli_ve, ("statements.jsonl",)),
    "nlvr2": (nlvr2, ("statements.json",)),
    "msrvtt": (msrvtt, ("videodatainfo.json", "questions.json?")),
    "msvd": (msvd, ("captions.txt",)),
    "vatex": (vatex, ("captions.json",)),
    "lines": (lines, ("items.jsonl",)),
    "words": (words, ("words.txt",)),
    "folders": (folders, ("folder",)),
    "tsv": (tsv, ("images.tsv", "captions.tsv", "questions.tsv?")),
}
