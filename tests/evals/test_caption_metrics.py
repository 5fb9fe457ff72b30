"""Caption metrics against the scores of the COCO caption evaluation (golden/git/coco_caption)."""

import gzip
import json
import os
import shutil

import pytest
from conftest import GOLDEN

from capvl.errors import UserError
from capvl.evals import caption_metrics


def load(name):
    path = os.path.join(GOLDEN, "git", "coco_caption", name)
    if not os.path.exists(path):
        pytest.skip(f"golden file {path} is absent (set CAPVL_GOLDEN)")
    with gzip.open(path) if name.endswith(".gz") else open(path) as file:
        return json.load(file)


@pytest.fixture(scope="module", autouse=True)
def installed():
    pytest.importorskip("pycocoevalcap", reason="the extra 'captions' is not installed")
    if not shutil.which("java"):
        pytest.skip("Java is not installed")


@pytest.fixture(scope="module", params=["fakecap134", "human500"])
def case(request):
    references, written = {}, {}
    for row in load(f"{request.param}_annotations.json.gz")["annotations"]:
        references.setdefault(str(row["image_id"]), []).append(row["caption"])
    for row in load(f"{request.param}_results.json.gz"):
        written[str(row["image_id"])] = row["caption"]
    return request.param, references, written, load("expected_scores.json")[request.param]


@pytest.mark.golden
def test_scores(case):
    name, references, written, expected = case
    metrics = ("bleu", "rouge", "cider")
    corpus, each = caption_metrics.scores(references, written, metrics)
    assert len(corpus) == 6
    for metric, value in corpus.items():
        assert value == pytest.approx(expected["scores"][metric], abs=1e-9), metric
    for key, values in expected["per_image"].items():
        for metric in corpus:
            assert each[key][metric] == pytest.approx(values[metric], abs=1e-7), (key, metric)


@pytest.mark.golden
def test_tokens(case):
    name, references, written, _ = case
    expected = load(f"{name}_tokenized.json.gz")
    assert caption_metrics.tokenize({k: references[k] for k in written}) == expected["refs"]


@pytest.mark.golden
@pytest.mark.slow
def test_meteor(case):
    _, references, written, expected = case
    corpus, _ = caption_metrics.scores(references, written, ("meteor",))
    assert corpus["METEOR"] == pytest.approx(expected["scores"]["METEOR"], abs=1e-9)


def test_unknown_metric():
    with pytest.raises(UserError, match="'cidr' is unknown. Did you mean 'cider'"):
        caption_metrics.check(("cidr",))
