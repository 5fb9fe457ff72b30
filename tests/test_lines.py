"""Where lines end, which encodings are read, and lists of names."""

import pytest
from conftest import case

from capvl import lines
from capvl.data.preparing import filters
from capvl.errors import UserError

OTHERS = ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


@pytest.mark.parametrize("character", OTHERS)
def test_a_character_is_no_end(character):
    assert lines.split(f"a{character}b\nc\r\n") == [f"a{character}b", "c"]


@pytest.mark.parametrize(
    "text, expected",
    [("", []), ("\n", [""]), ("a", ["a"]), ("a\n\nb", ["a", "", "b"]), ("a\rb\r\n", ["a\rb"]), ("\ufeffa\n", ["a"])],
)
def test_ends(text, expected):
    assert lines.split(text) == expected


@pytest.mark.cases
def test_names_with_separators_and_hashes():
    path = case("annotations", "cls2.txt")
    with open(path, "rb") as file:
        expected = [line.decode().strip() for line in file.read().split(b"\n") if line.strip()]
    assert lines.read_lines(path, "class names") == expected


@pytest.mark.parametrize(
    "data, sentence",
    [
        ("a\nb".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a\nb".encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        ("a\nb".encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
        ("a".encode("utf-32"), "is UTF-32; save it as UTF-8"),
        ("café".encode("latin-1"), r"is not UTF-8 \(byte 3\)"),
        (b"\n \n", "has nothing in it"),
    ],
)
def test_files_that_are_no_list(tmp_path, data, sentence):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        lines.read_lines(str(tmp_path / "x.txt"), "names")


def test_json_lists(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf["#a", "b\\u2028c"]')
    assert lines.read_lines(str(tmp_path / "x.json"), "names") == ["#a", "b\u2028c"]
    for text in ('["a", 5]', '{"a": 1}', '"a"'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match="should be a JSON list of texts"):
            lines.read_lines(str(tmp_path / "x.json"), "names")
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        lines.read_lines(str(tmp_path / "x.json"), "names")


def test_blocklists_have_comments_and_marks(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfbad\r\n# comment\r\nx\xe2\x80\xa8y\r\n")
    assert filters.read_blocklist(str(tmp_path / "b.txt")) == ("bad", "x\u2028y")
