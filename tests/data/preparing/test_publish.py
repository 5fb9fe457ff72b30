"""What data sets may be called."""

import json

import pytest
from conftest import write_tar
from test_shards import GOOD

from capvl import precompute
from capvl.data.preparing import annotated, corpus
from capvl.data.preparing.publish import check_name
from capvl.data.reading import sources
from capvl.errors import UserError

REFUSED = [
    ("my-data", "'my_data'"),
    ("my data", "'my_data'"),
    ("2017", "'data_2017'"),
    ("2017_01", "'data_2017_01'"),
    ("../x", "'x'"),
    ("a/b", "'a_b'"),
    ("_x", "'x'"),
    ("x:1.0.0", "'x_1_0_0'"),
    ("x\n", "'x'"),
    ("a*0.5", "'a_0_5'"),
    ("日本", "'data_日本'"),
    ("-", "'data'"),
    ("", "'data'"),
    ("scenes", "embedded"),
]


@pytest.mark.parametrize("name, near", REFUSED)
def test_names_that_no_data_set_can_have(name, near):
    with pytest.raises(UserError, match="choose another" if near == "embedded" else f"such as {near}"):
        check_name(name)
    if near != "embedded":
        check_name(near.strip("'"))


def test_they_are_refused_before_anything_is_made(tmp_path, tiny_recipe):
    write_tar(tmp_path / "0.tar", [("1", GOOD)])
    (tmp_path / "n.jsonl").write_text("{}")
    data = tmp_path / "data"
    calls = [
        lambda: corpus.prepare("my-data", {"train": str(tmp_path / "0.tar")}, str(data)),
        lambda: annotated.prepare("my-data", "jsonl", {"train": [str(tmp_path / "n.jsonl")]}, str(tmp_path), str(data)),
        lambda: precompute.write(tiny_recipe(data__data_dir=str(data)), "my-data", 1, "train"),
    ]
    for call in calls:
        with pytest.raises(UserError, match="such as 'my_data'"):
            call()
    assert not data.exists()


@pytest.mark.parametrize("name", ["x", "my_data", "MyData", "données", "a2017"])
def test_others_are_made_and_found_again(tmp_path, name):
    write_tar(tmp_path / "0.tar", [("1", GOOD)])
    folder = corpus.prepare(name, {"train": str(tmp_path / "0.tar")}, str(tmp_path), workers=1)
    assert json.loads((folder / "report.json").read_text())["train"]["examples"] == 1
    assert len(sources.open_source(name, "train", str(tmp_path))) == 1
