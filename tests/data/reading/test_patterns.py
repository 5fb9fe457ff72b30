"""Patterns of files: globs, braces, and names that only look like them."""

import pytest

from capvl.data.reading.patterns import expand
from capvl.errors import UserError


@pytest.fixture
def folder(tmp_path):
    names = ["a0.tar", "a1.tar", "b0.tar", "b1.tar", ".hidden.tar", "._a0.tar", "{a,b}.tar", "sub/c0.tar", "sub/c1.tar"]
    names += ["[2024] old/x0.tar", "[2024] old/x1.tar", "[2024] old/y[1].tar", "deep/er/z.tar"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "pattern, found",
    [
        ("a*.tar", ["a0.tar", "a1.tar"]),
        ("a?.tar", ["a0.tar", "a1.tar"]),
        ("a[1-9].tar", ["a1.tar"]),
        ("{b,a}{0..1}.tar", ["b0.tar", "b1.tar", "a0.tar", "a1.tar"]),
        ("{a,b}*.tar", ["a0.tar", "a1.tar", "b0.tar", "b1.tar"]),
        ("{a{0,1},sub/c1}.tar", ["a0.tar", "sub/c1.tar", "a1.tar"]),
        ("{a*,a0}.tar", ["a0.tar", "a1.tar"]),
        ("a{1..0}.tar", ["a1.tar", "a0.tar"]),
        ("{a,b}.tar", ["{a,b}.tar"]),
        ("[2024] old/*.tar", ["[2024] old/x0.tar", "[2024] old/x1.tar", "[2024] old/y[1].tar"]),
        ("[2024] old/x[0-9].tar", ["[2024] old/x0.tar", "[2024] old/x1.tar"]),
        ("[2024] old/y[1].tar", ["[2024] old/y[1].tar"]),
        ("[2024] old/y[1]*", ["[2024] old/y[1].tar"]),
        ("[2024] old/x{0..1}.tar", ["[2024] old/x0.tar", "[2024] old/x1.tar"]),
        ("*/c0.tar", ["sub/c0.tar"]),
        ("deep/**/z.tar", ["deep/er/z.tar"]),
        # What is missing stays for who reads it to count.
        ("a{0..2}.tar", ["a0.tar", "a1.tar", "a2.tar"]),
        ("{a*,none*}.tar", ["a0.tar", "a1.tar", "none*.tar"]),
    ],
)
def test_what_is_found(folder, pattern, found):
    assert expand(f"{folder}/{pattern}") == [f"{folder}/{name}" for name in found]


def test_zeros_and_folders_of_the_current_place(folder, monkeypatch):
    for i in (8, 9, 10):
        (folder / f"{i:03d}.tar").touch()
    monkeypatch.chdir(folder)
    assert expand("{008..010}.tar") == ["008.tar", "009.tar", "010.tar"]
    assert expand("sub/c*.tar") == ["sub/c0.tar", "sub/c1.tar"]


@pytest.mark.parametrize("pattern", ["no*.tar", "no{0..3}.tar", "{no,none}.tar", "no[1].tar", "no.tar", "{x}.tar"])
def test_nothing_is_found(folder, pattern):
    with pytest.raises(UserError, match="No file matches"):
        expand(f"{folder}/{pattern}")


def test_a_folder_is_no_file(folder):
    with pytest.raises(UserError, match=r"is a folder; name its files, such as '.*sub/\*.tar'"):
        expand(f"{folder}/sub")


def test_whole_paths_in_braces(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in "ab":
        (tmp_path / f"{name}.tar").write_bytes(b"")
    assert expand("~/{a,b}.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    with pytest.raises(UserError, match="is neither a local folder nor"):
        expand(f"{{ftp://host/a.tar,{tmp_path}/b.tar}}")
