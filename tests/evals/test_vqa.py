"""Answers of the hand-made captioner, and what is known without looking."""

import dataclasses
import json

import jax
import pytest
from colors import NAMES, by_word, colors, context_of, mesh
from handmade import captioner

from capvl.errors import UserError
from capvl.evals import vqa


def test_answers_of_the_hand_made_model(by_word, colors, mesh, tmp_path):
    """What is written is right; blind and prior know nothing; the list of answers binds; there are file and report."""
    from capvl import evals, reporting

    context, params = context_of(captioner, colors, mesh)
    context = dataclasses.replace(context, folder=tmp_path)
    (tmp_path / "some.txt").write_text("red\ngreen\n")
    evaluators = {
        "free": vqa.Vqa(task="caption", split="test", metrics=("exact", "contains"), prior="train", submission="coco"),
        "closed": vqa.Vqa(task="caption", split="test", vocabulary=str(tmp_path / "some.txt"), beams=2),
    }
    with jax.set_mesh(mesh):
        found, shown = evals.run({n: e.setup(context) for n, e in evaluators.items()}, params)
    reporting.save_shown(tmp_path, 3, shown)
    assert found["free/exact"] == found["free/contains"] == 1.0
    assert found["free/exact/blind"] <= 1 / 3  # Grey: the same text for all.
    assert found["free/exact/prior"] == pytest.approx(1 / 3)
    assert found["closed/exact"] == pytest.approx(2 / 3)
    (tmp_path / "long.txt").write_text("red\n" + "red " * 50 + "\n")
    closed = dict(task="caption", split="test", vocabulary=str(tmp_path / "long.txt"))
    with jax.set_mesh(mesh), pytest.raises(UserError, match="1 of 2 names are longer"):
        vqa.Vqa(**closed).setup(context)
    rows = json.loads((tmp_path / "submissions" / "colors_test.json").read_text())
    assert [row["caption"] for row in rows[:3]] == NAMES and rows[1]["image_id"] == "000000001"
    shown = json.loads((tmp_path / "samples" / "3.json").read_text())
    (matrix,) = shown["free"]
    assert matrix["names"][-1] == "other" and sum(map(sum, matrix["counts"])) == 12
    (tmp_path / "metrics.jsonl").write_text("")
    page = reporting.write([tmp_path], tmp_path / "report.html").read_text()
    assert "takes for what after step 3" in page and "<svg" in page


def test_answers_are_ranked(by_word, colors, mesh, tmp_path):
    """The likeliest of the list, whichever is asked first; what it needs is said."""
    context, params = context_of(captioner, colors, mesh)
    (tmp_path / "some.txt").write_text("green thing\nred\ngreen\n")
    listed = dict(task="caption", split="test", vocabulary=str(tmp_path / "some.txt"))
    with jax.set_mesh(mesh):
        for rank, first_twice in ((1, False), (2, True), (9, False)):
            ranked = vqa.Vqa(**listed, rank=rank, first_twice=first_twice)
            found = dict(p for p in ranked.setup(context)(params) if isinstance(p[1], float))
            # Of two with the same first token the list of one has whichever stands first.
            assert found["exact"] == pytest.approx(1 / 3 if rank == 1 else 2 / 3)
            assert found["exact/blind"] <= 1 / 3 + 1e-6
    for options, message in (
        (dict(rank=2), "rank needs a vocabulary"),
        (listed | dict(first_twice=True), "first_twice a rank"),
        (listed | dict(rank=2, beams=3), "what is ranked is not written"),
        (listed | dict(rank=-1), "rank must not be negative"),
    ):
        with pytest.raises(UserError, match=message):
            vqa.Vqa(**options)


def test_answers_without_looking():
    """The commonest answer to a question's words, to its kind, or at all."""
    rows = [
        {"question": ["q", "r"], "answer": ["yes", "no"], "kind": ["k", "l"]},
        {"question": ["q", "q"], "answer": ["yes", "no"], "kind": ["k", "k"]},
        {"question": ["r"], "answer": ["no"], "kind": ["l"]},
    ]

    class Source:
        def annotations(self, features, likely):
            return ({"questions": row} for row in rows)

    prior = vqa.commonest(Source(), "questions")
    asked = [vqa.Row(0, "", "", q, k, ()) for q, k in (("q", "k"), ("r", "l"), ("new", "l"), ("new", "m"))]
    assert [prior(row) for row in asked] == ["yes", "no", "no", "no"]
    # A question of the test server's split has no answers, and says nothing.
    rows[:] = [{"question": ["q", "r"], "answers": ["[]", '["no"]'], "kind": ["k", "l"]}]
    assert vqa.commonest(Source(), "questions")(asked[0]) == "no"
    rows[:] = [{"question": ["q"], "answers": ["[]"], "kind": ["k"]}]
    assert vqa.commonest(Source(), "questions")(asked[0]) == ""
