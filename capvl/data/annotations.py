"""Annotation files of captioning and question answering: one small adapter a format, all onto the same `Item`.

`FORMATS` is the index. An adapter gets the files of one split (or of all splits, where the file says which is whose)
and yields (split, Item); images are named, not read.
"""

import csv
import dataclasses
import json
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from capvl.data.tsv import Tsv
from capvl.errors import UserError


class Asked(NamedTuple):
    """A question, its answers (() where they are not given), its id and kind."""

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Item:
    """An image or clip and what is said about it.

    Attributes:
      image: name of the file, with or without folders and suffix; a number for the image of this id; FILE.tsv#ROW.
      id: what the evaluation server calls it; "" for the file's name.
      text: captions.
      questions: questions.
      class_name: its class; "" for none.
      region: (x0, y0, x1, y1) in pixels of the part that the text is about; None for the whole image.
    """

    image: str
    id: str = ""
    text: tuple[str, ...] = ()
    questions: tuple[Asked, ...] = ()
    class_name: str = ""
    region: tuple[float, float, float, float] | None = None


Items = Iterator[tuple[str, Item]]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read(format: str, files: Sequence[str], split: str) -> list[tuple[str, Item]]:
    """All (split, item) of a format's files.

    Args:
      format: a key of FORMATS.
      files: as many as the format has; see FORMATS.
      split: of the items, where the files don't say.

    Raises:
      UserError: missing, unreadable, or not of this format.
    """
    adapter, names = FORMATS[format]
    least = sum(not n.endswith("?") for n in names)
    if not least <= len(files) <= len(names):
        raise UserError(
            f"The format {format!r} has the files {','.join(names)} (? may be left out), not {','.join(files)}."
        )
    try:
        return list(adapter(split, *files))
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f"{', '.join(files)} is not of the format {format!r}: {type(e).__name__} {e}.") from e


def _json(path: str) -> Any:
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"Annotation file {path!r} does not exist.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path!r} is not JSON: {e}") from e


def _answers(row: dict) -> tuple[str, ...]:
    """Answers as texts, or as {"answer": text}; or a single one."""
    given = row.get("answers", [row["answer"]] if "answer" in row else [])
    return tuple(a["answer"] if isinstance(a, dict) else str(a) for a in given)


def coco(split: str, path: str) -> Items:
    """COCO captions, nocaps, VizWiz captions: {"images": [{"id", "file_name"}],
    "annotations": [{"image_id", "caption"}]}.

    Rejected captions are left out; images without captions (test splits) stay.
    """
    values, texts = _json(path), defaultdict(list)
    for row in values.get("annotations", ()):
        if not row.get("is_rejected"):
            texts[row["image_id"]].append(row["caption"])
    for image in values["images"]:
        name = image.get("file_name") or image.get("coco_url") or str(image["id"])
        yield split, Item(name, str(image["id"]), tuple(texts[image["id"]]))


def karpathy(split: str, path: str) -> Items:
    """Karpathy's dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json; restval belongs to train."""
    for row in _json(path)["images"]:
        name = str(pathlib.PurePosixPath(row.get("filepath", ""), row["filename"]))
        texts = tuple(sentence["raw"].strip() for sentence in row["sentences"])
        own = {"restval": "train"}.get(row["split"], row["split"])
        yield own, Item(name, str(row.get("cocoid", row.get("imgid", ""))), texts)


def textcaps(split: str, path: str) -> Items:
    """TextCaps: {"data": [{"image_id", "caption_str" or "reference_strs"}]}, one row a caption or an image."""
    texts = defaultdict(list)
    for row in _json(path)["data"]:
        texts[row["image_id"]] += row.get("reference_strs") or [row["caption_str"]] if len(row) > 1 else []
    for image, captions in texts.items():
        yield split, Item(image, image, tuple(dict.fromkeys(captions)))


def visual_genome(split: str, path: str) -> Items:
    """Visual Genome's region descriptions, each an item: [{"id": image, "regions": [{"region_id", "x", "y", "width",
    "height", "phrase"}]}]."""
    for image in _json(path):
        for row in image["regions"]:
            x, y = row["x"], row["y"]
            region = (x, y, x + row["width"], y + row["height"])
            yield split, Item(str(image["id"]), str(row["region_id"]), (row["phrase"].strip(),), region=region)


def vqa(split: str, questions: str, answers: str = "") -> Items:
    """VQAv2 (and VQA's own questions on other images): questions, and annotations where they are given."""
    given = {row["question_id"]: row for row in _json(answers)["annotations"]} if answers else {}
    asked = defaultdict(list)
    for row in _json(questions)["questions"]:
        answer = given.get(row["question_id"], {})
        asked[row["image_id"]].append(
            Asked(str(row["question_id"]), row["question"], _answers(answer), answer.get("answer_type", ""))
        )
    for image, rows in asked.items():
        yield split, Item(str(image), str(image), questions=tuple(rows))


def textvqa(split: str, path: str) -> Items:
    """TextVQA and ST-VQA: {"data": [{"image_id" or "file_name", "question", "question_id", "answers"}]}."""
    asked = defaultdict(list)
    for row in _json(path)["data"]:
        name = row.get("image_id") or row["file_name"]
        asked[name].append(Asked(str(row["question_id"]), row["question"], _answers(row)))
    for image, rows in asked.items():
        yield split, Item(str(image), str(image), questions=tuple(rows))


def vizwiz(split: str, path: str) -> Items:
    """VizWiz question answering: [{"image", "question", "answers": [{"answer"}]}]."""
    for row in _json(path):
        question = Asked(row["image"], row["question"], _answers(row), row.get("answer_type", ""))
        yield split, Item(row["image"], row["image"], questions=(question,))


def gqa(split: str, path: str) -> Items:
    """GQA: {question id: {"imageId", "question", "answer", "types": {"structural"}}}."""
    asked = defaultdict(list)
    for key, row in _json(path).items():
        kind = (row.get("types") or {}).get("structural") or ""
        asked[row["imageId"]].append(Asked(key, row["question"], _answers(row), kind))
    for image, rows in asked.items():
        yield split, Item(str(image), str(image), questions=tuple(rows))


def msrvtt(split: str, path: str, questions: str = "") -> Items:
    """MSR-VTT: {"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}; beside it a list of
    questions [{"video_id", "question", "answer", "id"}]."""
    values, texts, asked = _json(path), defaultdict(list), defaultdict(list)
    for row in values["sentences"]:
        texts[row["video_id"]].append(row["caption"])
    for row in _json(questions) if questions else ():
        name = row["video_id"]
        name = f"video{name}" if isinstance(name, int) else name
        asked[name].append(Asked(str(row["id"]), row["question"], _answers(row), row["question"].split()[0]))
    for row in values["videos"]:
        name = row["video_id"]
        own = {"validate": "val"}.get(row.get("split", split), row.get("split", split))
        yield own, Item(name, name, tuple(texts[name]), tuple(asked[name]))


def msvd(split: str, path: str) -> Items:
    """MSVD: lines of a clip's name and a caption, with a space or tab between."""
    texts = defaultdict(list)
    for number, line in enumerate(_lines(path)):
        name, _, caption = line.replace("\t", " ", 1).partition(" ")
        if not caption.strip():
            raise UserError(f"Line {number + 1} of {path!r} should be a clip's name and a caption.")
        texts[name].append(caption.strip())
    for name, captions in texts.items():
        yield split, Item(name, name, tuple(captions))


def vatex(split: str, path: str) -> Items:
    """VATEX: [{"videoID", "enCap": [...]}]; test files have no captions."""
    for row in _json(path):
        yield split, Item(row["videoID"], row["videoID"], tuple(row.get("enCap") or ()))


def lines(split: str, path: str) -> Items:
    """JSON lines of our own: {"image" (or "video"), "id", "text": [...], "class_name", "split",
    "questions": [{"id", "question", "answers": [...], "kind"}]}; all but the first may be left out."""
    for number, line in enumerate(_lines(path)):
        try:
            row = json.loads(line)
        except ValueError as e:
            raise UserError(f"Line {number + 1} of {path!r} is not JSON: {e}") from e
        texts = row.get("text") or ()
        asked = [
            Asked(str(q.get("id", f"{number}-{i}")), q["question"], _answers(q), q.get("kind", ""))
            for i, q in enumerate(row.get("questions") or ())
        ]
        name = row["image"] if "image" in row else row["video"]
        texts = (texts,) if isinstance(texts, str) else tuple(texts)
        item = Item(name, str(row.get("id", "")), texts, tuple(asked), row.get("class_name", ""))
        yield row.get("split", split), item


def words(split: str, path: str) -> Items:
    """Scene text: lines of an image's name and the word in it, with a tab, comma or space between."""
    for number, line in enumerate(_lines(path)):
        mark = next((m for m in ("\t", ",", " ") if m in line), None)
        name, _, word = line.partition(mark) if mark else (line, "", "")
        word = next(iter(csv.reader([word.strip()], skipinitialspace=True)), [""])[0] if mark == "," else word.strip()
        if not word:
            raise UserError(f"Line {number + 1} of {path!r} should be an image's name and a word.")
        yield split, Item(name.strip(), text=(word,))


def folders(split: str, path: str) -> Items:
    """Images in folders that are named as their classes."""
    root = pathlib.Path(path)
    if not root.is_dir():
        raise UserError(f"Folder {path!r} does not exist.")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"Folder {path!r} has no images in it.")
    for file in files:
        yield split, Item(str(file), class_name=file.parent.name.replace("_", " "))


def tsv(split: str, images: str, captions: str, questions: str = "") -> Items:
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
        captions_of = tuple(row["caption"] for row in texts.json(i)) if texts else ()
        rows = asked.json(i) if asked else ()
        questions_of = tuple(Asked(str(r["question_id"]), r["question"], _answers(r)) for r in rows)
        yield split, Item(f"{images}#{i}", key, captions_of, questions_of)


def _lines(path: str) -> list[str]:
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"Annotation file {path!r} does not exist.")
    rows = file.read_text(encoding="utf-8").splitlines()
    return [line for line in rows if line.strip() and not line.startswith("#")]


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
    "msrvtt": (msrvtt, ("videodatainfo.json", "questions.json?")),
    "msvd": (msvd, ("captions.txt",)),
    "vatex": (vatex, ("captions.json",)),
    "lines": (lines, ("items.jsonl",)),
    "words": (words, ("words.txt",)),
    "folders": (folders, ("folder",)),
    "tsv": (tsv, ("images.tsv", "captions.tsv", "questions.tsv?")),
}
