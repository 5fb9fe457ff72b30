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


ENDS = ["\r\n", "\r", "\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("where", ["{}a dog runs", "a dog{}runs", "a dog runs{}"])
def test_each_text_stays_on_its_line(where):
    """Whatever ends a line somewhere, an empty text, and one of blanks: each key has its own texts' tokens."""
    texts = {str(i): [where.format(end), f"number {i}"] for i, end in enumerate(ENDS)}
    texts |= {"empty": ["", " ", "\ud83d"], "odd": ["日本 café 🌍 dog"], "last": [""]}
    found = caption_metrics.tokenize(texts)
    for i in range(len(ENDS)):
        assert found[str(i)] == ["a dog runs", f"number {i}"]
    assert (found["empty"][:2], found["odd"], found["last"]) == (["", ""], ["日本 café dog"], [""])
    assert found.keys() == texts.keys()


def test_windows_ends_change_no_score():
    written = {"1": "a dog runs on the beach", "2": "two cats sleep here"}
    plain = caption_metrics.scores({k: [v, "x"] for k, v in written.items()}, written, ("bleu", "cider"))
    ends = caption_metrics.scores({k: [v + "\r\n", "x\r\n"] for k, v in written.items()}, written, ("bleu", "cider"))
    assert ends == plain and plain[0]["Bleu_4"] == pytest.approx(1.0)


def test_a_line_more_or_less_is_noticed(monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenize = PTBTokenizer.tokenize

    def splitting(self, rows):
        return tokenize(self, {k: [{"caption": v["caption"].replace("|", "\r")} for v in vs] for k, vs in rows.items()})

    monkeypatch.setattr(PTBTokenizer, "tokenize", splitting)
    with pytest.raises(UserError, match="did not give a line for each of 2 images' texts"):
        caption_metrics.tokenize({"1": ["a|b"], "2": ["c"]})


def test_unknown_metric():
    with pytest.raises(UserError, match="'cidr' is unknown. Did you mean 'cider'"):
        caption_metrics.check(("cidr",))
