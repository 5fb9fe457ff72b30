"""Annotation files of question answering: VQA, TextVQA, VizWiz, GQA (`.annotations` has the index)."""

from collections import defaultdict
from typing import Any

import pydantic

from capvl.data.reading.rejected import Rejected
from capvl.data.reading.rows import Asked, Given, Id, Item, Items, Kind, Row, Rows, Text


class _Questions(Row):
    questions: list[Any]


class _Annotations(Row):
    annotations: list[Any]


class _VqaQuestion(Row):
    question_id: Id
    image_id: Id
    question: Text


class _VqaAnswers(Row):
    question_id: Id
    answers: Given
    answer_type: Kind = ""


def vqa(split: str, left: Rejected, questions: str, answers: str = "") -> Items:
    """VQAv2 (and VQA's own questions on other images, OK-VQA): questions, and annotations where they are given."""
    given, asked = {}, defaultdict(list)
    if answers:
        rows = Rows(answers, left)
        for place, row in rows.of(_VqaAnswers, rows.json(_Annotations).annotations, "annotation"):
            if row.question_id in given:
                left.count("question is answered twice", place)
            given.setdefault(row.question_id, (place, row))
    rows, seen = Rows(questions, left), set()
    for place, row in rows.of(_VqaQuestion, rows.json(_Questions).questions, "question"):
        if row.question_id in seen:
            left.count("question id is there twice", place)
            continue
        seen.add(row.question_id)
        _, own = given.get(row.question_id, ("", None))
        if answers and own is None:
            left.count("question without annotation", place)
            continue
        said = (own.answers, own.answer_type) if own else ((), "")
        asked[row.image_id].append(Asked(row.question_id, row.question, *said))
    for key, (place, _) in given.items():
        if key not in seen:
            left.count("answers to an unknown question", place)
    for image, of_image in asked.items():
        yield split, Item(image, image, questions=tuple(of_image))


class _Data(Row):
    data: list[Any]


class _TextVqa(Row):
    image_id: Id | None = None
    file_path: Text | None = None
    file_name: Text | None = None
    question: Text
    question_id: Id
    answers: Given = ()

    @pydantic.model_validator(mode="after")
    def _named(self):
        if not (self.image_id or self.file_path or self.file_name):
            raise ValueError("image_id and file_name are missing")
        return self


def textvqa(split: str, left: Rejected, path: str) -> Items:
    """TextVQA and ST-VQA: {"data": [{"image_id", or "file_path" and "file_name", "question", "question_id",
    "answers"}]}; ST-VQA has the same names in several folders."""
    rows, asked = Rows(path, left), defaultdict(list)
    for _, row in rows.of(_TextVqa, rows.json(_Data).data):
        name = row.image_id or row.file_path or row.file_name
        asked[name].append(Asked(row.question_id, row.question, row.answers))
    for image, of_image in asked.items():
        yield split, Item(image, image, questions=tuple(of_image))


class _VizWiz(Row):
    image: Text
    question: Text
    answers: Given = ()
    answer_type: Kind = ""


def vizwiz(split: str, left: Rejected, path: str) -> Items:
    """VizWiz question answering: [{"image", "question", "answers": [{"answer"}]}]."""
    rows = Rows(path, left)
    for _, row in rows.of(_VizWiz, rows.listed()):
        question = Asked(row.image, row.question, row.answers, row.answer_type)
        yield split, Item(row.image, row.image, questions=(question,))


class _GqaTypes(Row):
    structural: Kind = ""


class _Gqa(Row):
    id: Text
    imageId: Id
    question: Text
    answers: Given = ()
    types: _GqaTypes | None = None


def gqa(split: str, left: Rejected, path: str) -> Items:
    """GQA: {question id: {"imageId", "question", "answer", "types": {"structural"}}}."""
    rows, asked = Rows(path, left), defaultdict(list)
    values = rows.listed(dict)
    for key, value in values.items():
        value = value | {"id": key} if isinstance(value, dict) else value
        if (row := rows.one(_Gqa, value, rows.place(f"question {key}"))) is not None:
            kind = row.types.structural if row.types else ""
            asked[row.imageId].append(Asked(row.id, row.question, row.answers, kind))
    for image, of_image in asked.items():
        yield split, Item(image, image, questions=tuple(of_image))
