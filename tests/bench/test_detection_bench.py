"""The detector's benchmark: its prompts name each class once, and both ways are timed."""

import numpy as np
import pytest

from capvl.bench import detection
from capvl.errors import UserError
from capvl.models.glip import GlipOptions

TINY = dict(encoder="w8d1h1m8/8", res=32, max_side=32, width=8, blocks=1, groups=2, fusion_width=8, fusion_heads=1)
TINY |= dict(text="w8d1h1m8", vocab=20, length=16, text_positions=16, pad_windows=False, level_norms=False)


@pytest.mark.parametrize("classes", [1, 5, 6, 12])
def test_each_class_has_tokens_of_its_own(classes):
    tokens, weights, label = detection.prompts(GlipOptions(**TINY), classes)
    assert sorted(label[label >= 0].tolist()) == list(range(classes)) and len(tokens[0]) == -(-classes // 5)
    assert ((weights > 0).sum(axis=3) <= 1).all() and not weights[:, :, 0].any()
    np.testing.assert_allclose(weights.sum(axis=2)[label >= 0], 1.0)
    assert not weights.sum(axis=2)[label < 0].any()
    assert (weights.sum(axis=3) > 0)[tokens == 0].sum() == 0


def test_what_it_needs():
    with pytest.raises(UserError, match="needs a model that reads texts"):
        detection.prompts(GlipOptions(**TINY | dict(classes=tuple("abcdefghijklmnop"), fusion="none")), 3)
    with pytest.raises(UserError, match="should be HEIGHTxWIDTH, both multiples of 32"):
        detection._size("800x1333", GlipOptions(**TINY))
    assert detection._size("", GlipOptions(**TINY | dict(res=40, max_side=70))) == (64, 96)


@pytest.mark.long
def test_both_ways_are_timed(capsys):
    model = [("model." + key, str(value)) for key, value in TINY.items()]
    words = ["--config=configs/glip_demo.py", "--classes=6", "--batch=2", "--calls=1"]
    detection.main([*words, *(f"--config.{key}={value}" for key, value in model)])
    assert "a text with each image" in capsys.readouterr().out
