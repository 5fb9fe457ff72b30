"""Which file a name in an annotation file stands for."""

import numpy as np
import pytest
from handmade import picture

from capvl.data.reading import lookup, sources
from capvl.data.reading.lookup import MISSING, SEVERAL, Names


def found(paths, wanted):
    names = Names()
    for path in paths:
        names.add(path, path)
    values, why = names.find(wanted)
    assert not values.keys() & why.keys()
    return [values.get(name) or why[name] for name in wanted]


@pytest.mark.parametrize(
    "paths, wanted, expected",
    [
        (["/d/a/1.jpg", "/d/b/1.jpg"], ["a/1.jpg", "b/1.jpg"], ["/d/a/1.jpg", "/d/b/1.jpg"]),
        (["/d/a/1.jpg", "/d/b/1.jpg"], ["1.jpg", "c/1.jpg"], [SEVERAL, MISSING]),
        (["/d/1.jpg"], ["a/1.jpg", "b/1.jpg"], [MISSING, MISSING]),  # One file can't be both.
        (["/d/1.jpg"], ["a/1.jpg", "2.jpg"], ["/d/1.jpg", MISSING]),
        (["/d/1.jpg", "/d/1.png"], ["1.png", "1"], ["/d/1.png", SEVERAL]),
        (["/d/a/1.png", "/d/b/1.jpg"], ["a/1.jpg"], ["/d/a/1.png"]),  # The folder says more than the suffix.
        (["/d/COCO_val2014_000000000042.jpg", "/d/000000000043.jpg"], ["42", "43", "44"],
         ["/d/COCO_val2014_000000000042.jpg", "/d/000000000043.jpg", MISSING]),
        (["/d/x_000000000042.jpg", "/d/y_000000000042.jpg"], ["42"], [SEVERAL]),
        (["/d/00123.jpg", "/d/7.jpg"], ["00123", "007"], ["/d/00123.jpg", MISSING]),
        (["/d/123.jpg", "/d/dog_5.jpg"], ["00123", "5", "²"], [MISSING, MISSING, MISSING]),
        (["/d/a/1.jpg", "/d/b/1.jpg"], ["a\\1.jpg"], ["/d/a/1.jpg"]),
        (["/d/v1.2_clip.jpg"], ["v1.2_clip"], ["/d/v1.2_clip.jpg"]),
        (["/d/cafe\u0301.jpg"], ["caf\u00e9.jpg"], ["/d/cafe\u0301.jpg"]),
    ],
)  # fmt: skip
def test_names(paths, wanted, expected):
    assert found(paths, wanted) == expected


def test_records_and_odd_json():
    assert lookup.names({"key": b"k", "json": b'{"image_id": 0}'}) == ["0"]
    for odd in (b"[1]", b"{", b'{"image_id": {"a": 1}}', b"[" * 100_000):
        assert lookup.names({"key": b"k", "json": odd}) == ["k"]
    assert lookup.names({"image_id": b"x"}) == ["x"]


def test_a_folder(tmp_path):
    for place, color in (("a", 10), ("b", 90)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.png").write_bytes(picture((color, 0, 0)))
        (tmp_path / place / "._1.png").write_bytes(b"macOS")
    values, why = lookup.open_images(str(tmp_path)).find(["a/1.png", "b/1.png", "._1.png"])
    assert [values[f"{p}/1.png"]() for p in "ab"] == [picture((c, 0, 0)) for c in (10, 90)]
    assert why == {"._1.png": MISSING}


@pytest.mark.parametrize("box", [(2, 1, 12, 9), (-3, -2, 5, 5), (15, 10, 40, 30)])
def test_cuts_are_those_of_pil(box):
    """ARO's own code cuts with PIL, which fills with black outside of the image."""
    import io

    from PIL import Image

    from capvl.data.images.decode import decode
    from capvl.evals.compositionality import cut

    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    made = decode(cut(buffer.getvalue, box))
    x0, y0, x1, y1 = box
    padded = np.pad(pixels, ((50, 50), (50, 50), (0, 0)))
    np.testing.assert_array_equal(made, padded[y0 + 50 : y1 + 50, x0 + 50 : x1 + 50])


def test_ones_own_files_under_a_known_name(tmp_path):
    """The table knows COCO's features; a data set that people made of their own has others."""
    from tensorflow_datasets import features

    own = features.FeaturesDict({"image": features.Image(), "text": features.Sequence(features.Text())})
    assert sources.guess_fields("coco_captions", own) == sources.Fields(text="text")
    theirs = features.FeaturesDict(
        {"image": features.Image(), "captions": features.Sequence({"text": features.Text()})}
    )
    assert sources.guess_fields("coco_captions:1.1.0", theirs).text == "captions/text"
