"""The deformable convolution's benchmark: alone, and beside torchvision where that is installed."""

import json

import pytest

from capvl.bench import deformable
from capvl.errors import UserError

TINY = ["--height=6", "--width=5", "--channels=4", "--rounds=1"]


def test_alone(tmp_path, capsys):
    deformable.main([*TINY, "--stride=2", "--dtype=bfloat16", f"--json={tmp_path / 'out.json'}"])
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["forward_flops_per_second"] * numbers["forward_seconds"] == pytest.approx(2 * 3 * 3 * 9 * 4 * 4)
    assert numbers["training_seconds"] > 0 and numbers["training_temporary_bytes"] > 0
    assert "training_seconds" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.parametrize("stride", [1, 2])
def test_beside_torchvision(stride, monkeypatch):
    pytest.importorskip("torchvision.ops", exc_type=(ImportError, RuntimeError))
    shape = deformable.Shape(2, 6, 5, 4, stride)
    numbers = deformable.measure(shape, 1, "torchvision")
    for name in ("forward", "training"):
        ratio = numbers[f"their_{name}_seconds"] / numbers[f"{name}_seconds"]
        assert numbers[f"{name}_speed_of_ours_by_theirs"] == pytest.approx(ratio)
    monkeypatch.setattr(deformable, "modulated_deformable", lambda *a, **k: 1.01 * deformable_of(*a, **k))
    with pytest.raises(UserError, match="gives other numbers"):
        deformable.measure(shape, 1, "torchvision")


deformable_of = deformable.modulated_deformable


def test_torchvision_is_float32_only():
    with pytest.raises(UserError, match="float32 only"):
        deformable.main([*TINY, "--dtype=bfloat16", "--against=torchvision"])
