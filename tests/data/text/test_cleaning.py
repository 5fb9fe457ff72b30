"""Texts as other code cleans them."""

import pytest
from conftest import load_golden

from capvl.data.text.cleaning import xvlm_caption, xvlm_question


@pytest.mark.golden
@pytest.mark.parametrize(("kind", "clean"), [("caption", xvlm_caption), ("question", xvlm_question)])
def test_x_vlms_texts(kind, clean):
    golden = load_golden("xvlm", "xvlm_util.npz")
    (out,) = (key for key in golden if key.startswith(f"clean.{kind}_out_max"))
    most = int(out.rpartition("max")[2])
    for given, expected in zip(golden[f"clean.{kind}_in"], golden[out], strict=True):
        # The original also cuts after so many words; here tokens are counted.
        assert " ".join(clean(str(given)).split(" ")[:most]) == str(expected)


def test_nothing_may_be_left():
    assert xvlm_caption(" .,!? \n") == "" and xvlm_question("?!") == ""
    assert xvlm_question("two  blanks - stay") == "two  blanks   stay"
