"""Tab-separated files with an index of where rows begin, as GIT's code and its relatives keep images and captions.

FILE.lineidx holds the rows' byte offsets as text, FILE.lineidx.8b the same as little-endian 64-bit integers; either
will do. Images are base64 in the second column, captions and questions JSON.
"""

import base64
import binascii
import pathlib
from typing import Any

import numpy as np

from capvl.errors import UserError
from capvl.lines import parse_json, read_text


class Tsv:
    """Rows of a file by number."""

    def __init__(self, path: str):
        """path: of the .tsv, whose index stands beside it.

        Raises:
          UserError: the file or its index is missing, or the index is not of this file.
        """
        self.path = path
        file = pathlib.Path(path)
        if not file.is_file():
            raise UserError(f"TSV file {path!r} does not exist.")
        # The index has the suffix .lineidx in place of .tsv, and in some data sets behind it.
        stems = (file.with_suffix(""), file)
        found = [pathlib.Path(f"{s}.lineidx{end}") for s in stems for end in (".8b", "")]
        index = next((f for f in found if f.is_file()), None)
        if index is None:
            raise UserError(
                f"TSV file {path!r} has no index {str(found[1])!r}; write one with "
                f"`python -m capvl.data.tsv index {path}`."
            )
        try:
            binary = index.suffix == ".8b"
            self.offsets = (
                np.fromfile(index, "<i8") if binary else np.array(read_text(index, "The index").split(), np.int64)
            )
        except ValueError as e:
            raise UserError(f"{str(index)!r} is not an index of byte offsets.") from e
        size = file.stat().st_size
        if len(self.offsets) and not (
            np.all(np.diff(self.offsets) > 0) and 0 <= self.offsets[0] <= self.offsets[-1] < size
        ):
            raise UserError(f"The index {str(index)!r} is not of {path!r} as it is now; write it again.")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, number: int) -> list[str]:
        """The columns of a row."""
        with open(self.path, "rb") as file:
            file.seek(int(self.offsets[number]))
            line = file.readline()
        try:
            text = line.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"Row {number} of {self.path!r} is not UTF-8.") from e
        return text.removesuffix("\n").removesuffix("\r").split("\t")

    def image(self, number: int) -> bytes:
        """The decoded second column."""
        row = self[number]
        try:
            return base64.b64decode(row[1], validate=True)
        except (IndexError, binascii.Error) as e:
            raise UserError(f"Row {number} of {self.path!r} has no base64 image in its second column.") from e

    def json(self, number: int) -> Any:
        """The second column as JSON."""
        row = self[number]
        try:
            return parse_json(row[1])
        except (IndexError, ValueError) as e:
            raise UserError(f"Row {number} of {self.path!r} has no JSON in its second column.") from e


def write_index(path: str) -> int:
    """Writes both indices of a file; returns the number of rows.

    Raises:
      UserError: there is no such file.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"TSV file {path!r} does not exist.")
    offsets, position = [], 0
    with file.open("rb") as lines:
        for line in lines:
            offsets.append(position)
            position += len(line)
    stem = file.with_suffix("")
    pathlib.Path(f"{stem}.lineidx").write_text("".join(f"{o}\n" for o in offsets))
    np.array(offsets, "<i8").tofile(f"{stem}.lineidx.8b")
    return len(offsets)
