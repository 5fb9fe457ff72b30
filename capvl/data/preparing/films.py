"""Annotation files of videos: MSR-VTT, MSVD, VATEX (`.annotations` has the index)."""

from collections import defaultdict
from typing import Annotated, Any

import pydantic

from capvl.data.reading.rejected import Rejected
from capvl.data.reading.rows import Asked, Given, Id, Item, Items, Row, Rows, Split, Text, Texts


class _Msrvtt(Row):
    videos: list[Any]
    sentences: list[Any] = []


class _Video(Row):
    video_id: Text
    split: Split | None = None


class _VideoCaption(Row):
    video_id: Text
    caption: Text


def _video_name(value: Any) -> Any:
    return f"video{value}" if isinstance(value, int) and not isinstance(value, bool) else value


class _VideoQuestion(Row):
    video_id: Annotated[Text, pydantic.BeforeValidator(_video_name)]
    question: Text
    answers: Given = ()
    id: Id


def msrvtt(split: str, left: Rejected, path: str, questions: str = "") -> Items:
    """MSR-VTT: {"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}; beside it a list of
    questions [{"video_id", "question", "answer", "id"}]."""
    rows, texts, asked = Rows(path, left), defaultdict(list), defaultdict(list)
    values = rows.json(_Msrvtt)
    videos = {row.video_id: row for _, row in rows.of(_Video, values.videos, "video")}
    for place, row in rows.of(_VideoCaption, values.sentences, "sentence"):
        if row.video_id not in videos:
            left.count("caption of an unknown video", place)
        texts[row.video_id].append(row.caption)
    rows = Rows(questions, left)
    for place, row in rows.of(_VideoQuestion, rows.listed(), "question") if questions else ():
        if row.video_id not in videos:
            left.count("question of an unknown video", place)
        asked[row.video_id].append(Asked(row.id, row.question, row.answers, row.question.split()[0]))
    for name, row in videos.items():
        own = {"validate": "val", None: split}.get(row.split, row.split)
        yield own, Item(name, name, tuple(texts[name]), tuple(asked[name]))


def msvd(split: str, left: Rejected, path: str) -> Items:
    """MSVD: lines of a clip's name and a caption, with a space or tab between; # begins a comment there, as no clip's
    name has one."""
    texts = defaultdict(list)
    for place, line in Rows(path, left).lines():
        name, _, caption = line.replace("\t", " ", 1).partition(" ")
        if line.startswith("#"):
            continue
        if not caption.strip():
            left.count("should be a clip's name and a caption", place)
            continue
        texts[name].append(caption.strip())
    for name, captions in texts.items():
        yield split, Item(name, name, tuple(captions))


class _Vatex(Row):
    videoID: Text
    enCap: Texts = []


def vatex(split: str, left: Rejected, path: str) -> Items:
    """VATEX: [{"videoID", "enCap": [...]}]; test files have no captions."""
    rows = Rows(path, left)
    for place, row in rows.of(_Vatex, rows.listed(), "video"):
        yield split, Item(row.videoID, row.videoID, rows.texts(row.enCap, place))
