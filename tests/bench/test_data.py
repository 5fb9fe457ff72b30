"""The loader's benchmark: what it computes, on a few images; its speeds are not looked at."""

import dataclasses
import io
import json

import numpy as np
import pytest
from conftest import tiny_values, write_tar
from PIL import Image

from capvl.bench import data
from capvl.chips import CHIPS
from capvl.errors import UserError


def test_cores_needed_by_hand():
    chip = dataclasses.replace(CHIPS[1], flops=100.0, chips_a_host=8)
    # 8 chips at 100 FLOP/s and half of their peak do 400 FLOP/s, 200 images/s of 2 FLOP; a core makes 10 images/s.
    assert data.cores_needed(2.0, 0.1, 0.5, chip) == (200.0, 20.0)


@pytest.fixture
def tars(tmp_path):
    path, rng = tmp_path / "0.tar", np.random.default_rng(0)
    samples = []
    for i in range(8):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(buffer, "JPEG")
        samples.append((str(i), {"jpg": buffer.getvalue(), "txt": b"a photo"}))
    write_tar(path, samples)
    return str(path)


@pytest.mark.long
def test_command(tars, tmp_path, data_dir, capsys):
    recipe = tmp_path / "tiny.py"
    values = tiny_values(data_dir)
    recipe.write_text(f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({values!r})\n")
    out = tmp_path / "numbers.json"
    small = ["--res=32", "--batch=4", "--batches=1", "--rounds=1", "--workers=1"]
    data.main([f"--tars={tars}", *small, f"--config={recipe}", f"--json={out}", "--mfu=0.4"])
    found = json.loads(out.read_text())
    assert found["bare"] > 0 and found["loader"] > 0
    assert set(found["images_per_second_by_workers"]) == {"0", "1"}
    by_chip = {row["chip"]: row for row in found["recipes"]}
    assert set(by_chip) == {c.name for c in CHIPS if c.chips_a_host}
    for row in by_chip.values():
        assert row["cores"] == pytest.approx(row["images_per_second"] * row["cpu_seconds"])
    v4, v5p = by_chip["v4"], by_chip["v5p"]
    assert v5p["images_per_second"] / v4["images_per_second"] == pytest.approx(459 / 275)
    shown = capsys.readouterr().out
    assert "40% of their peak" in shown and "cores needed" in shown and "worker processes" in shown


def test_no_jpegs(tmp_path):
    (tmp_path / "out").mkdir()
    write_tar(tmp_path / "0.tar", [])
    with pytest.raises(UserError, match="No JPEG in"):
        data.upscale(str(tmp_path / "0.tar"), 64, 4, tmp_path / "out")
