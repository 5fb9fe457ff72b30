"""What is let in, what counts as the same, and Beam's way against the way of this machine's processes."""

import io
import json

import numpy as np
import pytest
from conftest import real_data, write_tar
from PIL import Image

from capvl.data.preparing import corpus, filters, shards
from capvl.data.preparing.filters import Filters
from capvl.data.reading import samples, sources
from capvl.data.reading.rejected import Rejected, RejectedError
from capvl.errors import UserError


def photo(seed=0, size=(96, 72), quality=90):
    """A smooth picture, so that its hash survives another size and quality."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((96, 72), Image.Resampling.BICUBIC).resize(size).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def outcome(filter_, captions, url=""):
    try:
        filter_.check_texts(captions, url)
    except RejectedError as e:
        return str(e)
    return ""


@pytest.mark.parametrize(
    ("options", "captions", "expected"),
    [
        ({}, ["a dog"], ""),
        ({}, [""], "empty text"),
        ({"min_text": 5}, ["a dog"], ""),
        ({"min_text": 6}, ["a dog"], "text too short"),
        ({"min_text": 6}, ["a brown dog", "dog"], "text too short"),
        ({"max_text": 5}, ["a dog"], ""),
        ({"max_text": 4}, ["a dog"], "text too long"),
        ({"blocklist": ("dog",)}, ["A DOG!"], "blocked text"),
        ({"blocklist": ("dog",)}, ["a hotdog, dogs"], ""),
        ({"blocklist": ("bad dog", "c++")}, ["one bad dog"], "blocked text"),
        ({"blocklist": ("c++",)}, ["about c++ and"], "blocked text"),
        ({"blocklist": ("url:evil.example/",)}, ["evil.example/"], ""),
    ],
)
def test_texts(options, captions, expected):
    assert outcome(Filters(**options), captions) == expected


def test_addresses():
    blocked = Filters(blocklist=("url:evil.example/",))
    assert outcome(blocked, ["a"], "https://evil.example/1.jpg") == "blocked address"
    assert outcome(blocked, ["a"], "https://good.example/1.jpg") == ""


def test_languages():
    pytest.importorskip("py3langid")
    english = Filters(languages=("en",))
    english.check()
    assert outcome(english, ["a dog runs over the grass"]) == ""
    assert outcome(english, ["ein Hund läuft über das Gras"]) == "another language"
    assert outcome(Filters(languages=("en", "de")), ["ein Hund läuft über das Gras"]) == ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_side": 0}, "must be at least 1"),
        ({"duplicates": ("imag",)}, "Unknown kind of duplicate 'imag'. Did you mean 'image'"),
        ({"languages": ("xx",)}, "Unknown language 'xx'"),
    ],
)
def test_filters_that_make_no_sense(options, sentence):
    if "languages" in options:
        pytest.importorskip("py3langid")
    with pytest.raises(UserError, match=sentence):
        Filters(**options).check()


def test_blocklist_files(tmp_path):
    file = tmp_path / "blocked.txt"
    file.write_text("# words\nbad\n\nurl:evil.example\n")
    assert filters.read_blocklist(str(file)) == ("bad", "url:evil.example")
    with pytest.raises(UserError, match="Blocklist '.*none.txt' can't be read"):
        filters.read_blocklist(str(tmp_path / "none.txt"))


def test_an_image_without_a_pattern_is_no_duplicate():
    flat = [np.full((32, 32, 3), color, np.uint8) for color in ((255, 0, 0), (0, 0, 255), (255, 255, 255))]
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    asked = filters.Filters(duplicates=("image", "text"))
    for pixels in (*flat, ramp, ramp[:, ::-1], ramp.swapaxes(0, 1)):
        assert set(asked.hashes(np.ascontiguousarray(pixels), ["a"])) == {"text"}


def test_the_same_image_at_another_size_and_quality():
    from capvl.data.images.decode import decode

    first, second, other = (filters.image_hash(decode(data)) for data in (photo(1), photo(1, (192, 144), 70), photo(2)))
    assert first == second != other
    assert len(first) == 16


def test_the_same_text_whatever_its_case_and_spaces():
    assert filters.text_hash(["A  dog\n"]) == filters.text_hash(["a dog"]) != filters.text_hash(["a cat"])


@pytest.fixture
def web(tmp_path):
    """Tars with duplicates of every kind within and across them, one cut short; and the same rows as parquet."""
    import pyarrow
    import pyarrow.parquet

    def sample(image, text, **meta):
        return {"jpg": photo(image), "txt": text.encode(), "json": json.dumps(meta).encode()}

    first = [
        ("a", sample(1, "one dog")),
        ("b", sample(2, "two dogs")),
        ("c", sample(1, "the first image again")),
        ("d", sample(3, "ONE  dog")),
    ]
    second = [
        ("e", sample(2, "two dogs")),  # Both: the image is the reason.
        ("a", sample(4, "another sample by a key of another file")),
        ("f", sample(5, "five", url="https://evil.example/5.jpg")),
        ("g", sample(6, "six")),
        ("h", {"txt": b"no image"}),
    ]
    write_tar(tmp_path / "0.tar", first)
    write_tar(tmp_path / "1.tar", second)
    write_tar(tmp_path / "2.tar", [(f"z{i}", sample(20 + i, f"text {i}")) for i in range(4)])
    whole = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(whole[: len(whole) * 5 // 8])
    (tmp_path / "3.tar").write_bytes(b"")
    for name, rows in (("0", first), ("1", second)):
        table = [
            {"key": key, "caption": m["txt"].decode(), "jpg": m.get("jpg")} | json.loads(m.get("json", b"{}"))
            for key, m in rows
        ]
        names = sorted({n for row in table for n in row})
        columns = {n: [row.get(n) for row in table] for n in names}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    return tmp_path


EVERY = Filters(duplicates=("image", "text"), blocklist=("url:evil.example",))


def keys_of(folder, name="web"):
    source = sources.open_source(name, "train", str(folder), features=("key",))
    return [source[i]["key"].decode() for i in range(len(source))]


def test_duplicates_within_and_across_shards(web):
    folder = corpus.prepare("web", {"train": f"{web}/?.tar"}, str(web / "out"), filters=EVERY, workers=1)
    assert keys_of(web / "out")[:4] == ["a", "b", "a", "g"]
    rejected = json.loads((folder / "report.json").read_text())["train"]["rejected"]
    assert rejected["duplicate image"] == {"count": 2, "first": ["c", "e"]}
    assert rejected["duplicate text"] == {"count": 1, "first": ["d"]}
    assert "duplicate key" not in rejected
    assert rejected["blocked address"] == {"count": 1, "first": ["f"]}
    assert rejected["no image"]["count"] == 1
    assert rejected["tar cut short"]["count"] == 2
    card = (folder / "card.md").read_text()
    assert "| duplicate image | 2 |" in card and "| duplicates | image, text |" in card
    assert "characters of text" in card
    assert not list(web.glob("out/web/incomplete*"))


def test_without_the_option_only_keys_count(web):
    corpus.prepare("web", {"train": f"{web}/[01].tar"}, str(web / "out"), workers=1)
    assert keys_of(web / "out") == ["a", "b", "c", "d", "e", "a", "f", "g"]


def test_parquet_gives_the_same_examples(web):
    for kind in ("tar", "parquet"):
        corpus.prepare(kind, {"train": f"{web}/[01].{kind}"}, str(web / "out"), filters=EVERY, workers=1)
    tar, parquet = (
        sources.open_source(kind, "train", str(web / "out"), features=("key", "image", "text"))
        for kind in ("tar", "parquet")
    )
    assert len(tar) == len(parquet) == 4
    for i in range(4):
        assert tar[i] == parquet[i]


def test_parquet_of_hugging_face_and_files_that_are_none(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [{"bytes": photo(), "path": "x.jpg"}], "text": ["a dog"], "width": [96]})
    pyarrow.parquet.write_table(table, tmp_path / "part-0.parquet")
    rejected = Rejected()
    ((key, members),) = samples.samples(str(tmp_path / "part-0.parquet"), 10**6, rejected.count)
    assert key == "part-0-000000000"
    assert members["jpg"] == photo() and members["txt"] == b"a dog"
    assert json.loads(members["json"]) == {"text": "a dog", "width": 96}
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for name in ("bad.parquet", "none.parquet", "none.tar"):
        assert list(samples.samples(str(tmp_path / name), 10**6, rejected.count)) == []
    assert {reason: n for reason, (n, _) in rejected.items()} == {"parquet can't be read": 1, "file missing": 2}


def test_a_killed_thinning_is_done_again(web, monkeypatch):
    thin = shards.thin_shard

    def killed(part, dropped):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        corpus.concurrent.futures, "ProcessPoolExecutor", lambda *a: corpus.concurrent.futures.ThreadPoolExecutor(1)
    )
    monkeypatch.setattr(shards, "thin_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        corpus.prepare("web", {"train": f"{web}/[01].tar"}, str(web / "out"), filters=EVERY)
    assert not (web / "out/web" / corpus.VERSION).exists()
    monkeypatch.setattr(shards, "thin_shard", thin)
    corpus.prepare("web", {"train": f"{web}/[01].tar"}, str(web / "out"), filters=EVERY)
    assert keys_of(web / "out") == ["a", "b", "a", "g"]


def assert_same_files(one, other):
    names = sorted(str(f.relative_to(one)) for f in one.iterdir())
    assert names == sorted(str(f.relative_to(other)) for f in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_beam_makes_the_same_files(web):
    pytest.importorskip("apache_beam")
    made = {}
    for way, options in (("here", {"workers": 2}), ("beam", {"beam": ["--runner=DirectRunner"]})):
        splits = {"train": f"{web}/?.tar", "val": f"{web}/1.tar"}
        made[way] = corpus.prepare("web", splits, str(web / way), filters=EVERY, **options)
    assert_same_files(made["here"], made["beam"])


@pytest.mark.realdata
def test_beam_makes_the_same_files_of_real_photos(tmp_path):
    pytest.importorskip("apache_beam")
    pattern = real_data("flickr8k", "val") + "/*.tar"
    one = corpus.prepare("photos", {"val": pattern}, str(tmp_path / "one"), filters=EVERY)
    other = corpus.prepare("photos", {"val": pattern}, str(tmp_path / "other"), filters=EVERY, beam=[])
    assert_same_files(one, other)


def test_beam_that_is_missing_is_said(web, monkeypatch):
    find = corpus.importlib.util.find_spec
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None if name == "apache_beam" else find(name))
    with pytest.raises(UserError, match=r"needs it installed: pip install -e '.\[beam\]'"):
        corpus.prepare("web", {"train": f"{web}/0.tar"}, str(web / "out"), beam=[])
    assert not (web / "out").exists()


def test_beam_says_what_is_wrong(web):
    pytest.importorskip("apache_beam")
    with pytest.raises(UserError, match="no example left; rejected: 1 x tar cut short"):
        corpus.prepare("none", {"train": f"{web}/3.tar"}, str(web / "out"), beam=[])
    assert not (web / "out/none" / corpus.VERSION).exists()
    with pytest.raises(UserError, match="Beam does not know the option --no_such_option"):
        corpus.prepare("other", {"train": f"{web}/0.tar"}, str(web / "out"), beam=["--no_such_option=1"])
    with pytest.raises(UserError, match="No file matches"):
        corpus.prepare("other", {"train": f"{web}/*.zip"}, str(web / "out"), beam=[])
