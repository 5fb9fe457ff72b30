"""Rows of annotation files: what each must hold (pydantic), and the count of those that are left out.

A row that does not hold it is counted with its reason and its place in the file, and the others are read on.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple, TypeVar

import pydantic

from capvl.data.reading.rejected import Rejected
from capvl.lines import read_json, read_text, split


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
      second: another image, which the text is about too; "" for none.
    """

    image: str
    id: str = ""
    text: tuple[str, ...] = ()
    questions: tuple[Asked, ...] = ()
    class_name: str = ""
    region: tuple[float, float, float, float] | None = None
    second: str = ""

    @property
    def images(self) -> tuple[str, ...]:
        """Names of all its images."""
        return (self.image, self.second) if self.second else (self.image,)


Items = Iterator[tuple[str, Item]]


def _as_text(value: Any) -> Any:
    """Whole numbers say what their digits say, also where they were written as 7.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_answer(value: Any) -> Any:
    value = value.get("answer") if isinstance(value, dict) else value
    return str(value) if isinstance(value, float) and math.isfinite(value) else _as_text(value)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float) else value


def _whole(text: str) -> str:
    if _SURROGATE.search(text):
        raise ValueError("has half of a surrogate pair")
    return text


def _not_empty(text: str) -> str:
    if not (text := text.strip()):
        raise ValueError("should not be empty")
    return text


_SURROGATE = re.compile("[\ud800-\udfff]")
_String = Annotated[pydantic.StrictStr, pydantic.AfterValidator(_whole)]
Text = Annotated[_String, pydantic.AfterValidator(_not_empty)]
"""A text with something in it, without the blanks around it."""


def _says(text: str) -> str:
    if not text.strip():
        raise ValueError("should not be empty")
    return text


Caption = Annotated[_String, pydantic.AfterValidator(_says)]
"""A text with something in it, as it stands: characters of it are counted."""
Id = Annotated[Text, pydantic.BeforeValidator(_as_text)]
"""What a text or a whole number says: 1 and "1" are the same, and "001" is another."""
Name = Annotated[
    Text, pydantic.BeforeValidator(_as_text), pydantic.AfterValidator(lambda n: re.sub(r"[\r\n]+", " ", n))
]
"""Of a class; on one line."""
Answer = Annotated[_String, pydantic.BeforeValidator(_as_answer), pydantic.AfterValidator(str.strip)]
"""A text, a number, or {"answer": …}."""
Answers = Annotated[tuple[Answer, ...], pydantic.BeforeValidator(_as_list)]
"""Several, or a single one."""
Given = Annotated[Answers, pydantic.Field(validation_alias=pydantic.AliasChoices("answers", "answer"))]
"""A row's answers, under either name."""
Kind = Annotated[_String, pydantic.BeforeValidator(lambda value: "" if value is None else value)]
Number = Annotated[pydantic.FiniteFloat, pydantic.Strict()]
Length = Annotated[Number, pydantic.Field(gt=0)]
Texts = Annotated[list[Any], pydantic.BeforeValidator(lambda v: [v] if v is None or isinstance(v, str) else v)]
"""A list of texts, or a single one; each is looked at by itself (`Rows.texts`)."""
Split = Annotated[_String, pydantic.StringConstraints(pattern=r"^\w+$")]


class Row(pydantic.BaseModel):
    """What a row holds; further keys are passed over."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)


T = TypeVar("T", bound=Row)
_TEXT = pydantic.TypeAdapter(Text)


class Rows:
    """The rows of one file."""

    def __init__(self, path: str, left: Rejected):
        """path: of the file; left: is told of what is left out."""
        self.path, self.left = path, left

    def json(self, kind: type[T]) -> T:
        """The whole file, an object with some lists.

        Raises:
          UserError: it can't be read, or is of another form.
        """
        value = read_json(self.path, "Annotation file")
        try:
            return kind.model_validate(value)
        except pydantic.ValidationError as e:
            wanted = ", ".join(name for name, field in kind.model_fields.items() if field.is_required())
            found = _reason(e)[0] if isinstance(value, dict) else f"and is {_KINDS[type(value)]}"
            raise FormatError(f"{os.path.basename(self.path)} should be an object with {wanted}, {found}") from e

    def listed(self, shape: type = list) -> Any:
        """The whole file, a list or an object of rows.

        Raises:
          UserError: it can't be read, or is of another form.
        """
        value = read_json(self.path, "Annotation file")
        if not isinstance(value, shape):
            found = _KINDS[type(value)]
            raise FormatError(f"{os.path.basename(self.path)} should be {_SHAPES[shape]} of rows, and is {found}")
        return value

    def lines(self) -> Iterator[tuple[str, str]]:
        """(place, line) of every line that is not blank.

        Raises:
          UserError: it can't be read.
        """
        for number, line in enumerate(split(read_text(self.path, "Annotation file")), 1):
            if line.strip():
                yield self.place(f"line {number}"), line

    def place(self, where: str) -> str:
        """A place in this file in words."""
        return f"{where} of {os.path.basename(self.path)}"

    def of(self, kind: type[T], values: Iterable[Any], what: str = "row") -> Iterator[tuple[str, T]]:
        """(place, row) of those that are as they should be.

        Raises:
          FormatError: none is, and all lack something: they are rows of something else.
        """
        first, found = "", False
        for number, value in enumerate(values):
            place = self.place(f"{what} {number}")
            try:
                row = kind.model_validate(value)
            except pydantic.ValidationError as e:
                reason, where = _reason(e)
                self.left.count(reason, f"{place}{where}")
                other = all(error["type"] in ("missing", "model_type") for error in e.errors())
                first, found = first or f"{place}: {reason}", found or not other
                continue
            found = True
            yield place, row
        if first and not found:
            raise FormatError(first)

    def one(self, kind: type[T], value: Any, place: str) -> T | None:
        """A row; None where it is left out."""
        try:
            return kind.model_validate(value)
        except pydantic.ValidationError as e:
            reason, where = _reason(e)
            self.left.count(reason, f"{place}{where}")
        return None

    def texts(self, values: Iterable[Any], place: str, what: str = "caption") -> tuple[str, ...]:
        """Those of some texts that are as they should be."""
        found = []
        for number, value in enumerate(values):
            try:
                found.append(_TEXT.validate_python(value))
            except pydantic.ValidationError as e:
                self.left.count(f"{what}: {_reason(e)[0]}", f"{place}, {what} {number}")
        return tuple(found)


class FormatError(Exception):
    """A file is of another format; the message says how."""


_KINDS = {
    list: "a list",
    dict: "an object",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "a truth value",
    type(None): "null",
}
_SHAPES = {list: "a list", dict: "an object"}
_WORDS = {
    "missing": "is missing",
    "string_type": "should be a text",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "model_type": "should be an object",
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "greater_than": "should be above 0",
    "string_pattern_mismatch": "should be letters, digits and _",
}


def _reason(error: pydantic.ValidationError) -> tuple[str, str]:
    """What is wrong first, without numbers, so that the same faults are counted together; and where in lists."""
    first = error.errors(include_url=False, include_context=False, include_input=True)[0]
    message = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["input"] is None and first["type"] != "missing":
        message = "is null"
    names = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
    where = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
    return f"{names} {message}".strip(), where
