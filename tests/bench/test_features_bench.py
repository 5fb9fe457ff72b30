"""The benchmark of features: what it computes, on a few images; its speeds are not looked at."""

import json

import pytest
from conftest import tiny_values

from capvl.bench import features
from capvl.errors import UserError


@pytest.fixture
def config(tmp_path, data_dir):
    path = tmp_path / "tiny.py"
    values = tiny_values(data_dir)
    path.write_text(f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({values!r})\n")
    return str(path)


@pytest.mark.parametrize("played", [["--wait=1"], pytest.param([], marks=pytest.mark.long)])
def test_command(config, tmp_path, capsys, played):
    out = tmp_path / "numbers.json"
    features.main(
        [f"--config={config}", "--data=scenes/tiny:val", "--limit=20", "--rounds=1", f"--json={out}", *played]
    )
    said, numbers = capsys.readouterr().out, json.loads(out.read_text())
    assert all(
        words in said for words in ("plain loop", "evaluators, 2 threads", "share of the slower half", "load of")
    )
    assert numbers["slower"] == min(numbers["decode"], numbers["model"]) > 0
    assert ("shared" in numbers) == (not played)
    assert set(numbers["cpu_seconds"]) == {"decode", "model", "plain", "whole"}


def test_bad_input(config):
    with pytest.raises(UserError, match="--rounds should be at least 1"):
        features.main([f"--config={config}", "--rounds=0"])
    with pytest.raises(UserError, match="no split 'vall'"):
        features.main([f"--config={config}", "--data=scenes/tiny:vall"])
