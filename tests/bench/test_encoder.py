"""The forward pass alone, of both kinds of encoder; beside timm's it is in tests/convert/test_torch_swin.py."""

import json

import pytest

from capvl.bench import encoder

TINY = ["--batch=2", "--rounds=1", "--res=32"]
ENCODERS = {"swin-w8d2-1h2-2/4": ["--window=4"], "w16d2h2m32/8": []}


@pytest.mark.parametrize("name", ENCODERS)
def test_alone(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encoder, "matmul_rate", lambda: 1e9)
    encoder.main([f"--encoder={name}", *ENCODERS[name], *TINY, "--loop", f"--json={tmp_path / 'out.json'}"])
    numbers = json.loads((tmp_path / "out.json").read_text())
    flops = encoder.options_of(name, 32, 4 if "swin" in name else 7, True).encoder_flops()
    assert numbers["flops_per_second"] * numbers["seconds"] == pytest.approx(2 * flops)
    assert numbers["share_of_matmul"] == pytest.approx(numbers["flops_per_second"] / 1e9)
    assert "images_per_second" in capsys.readouterr().out
