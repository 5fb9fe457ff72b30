"""What class heads say, of a model whose right answers are known: by file, by data set, and by the face."""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from colors import NAMES, by_word, colors, context_of, jpeg, mesh
from flax import nnx
from handmade import COLORS, WORDS, ByWord, two_towers

from capvl.data.preparing import annotated
from capvl.errors import UserError
from capvl.evals import judge
from capvl.evals.entailment import Entailment
from capvl.inference.face import LoadedModel
from capvl.models.abilities import Ability
from capvl.models.parameters import Blueprint
from capvl.weights import Weights

ENTAILMENT = ("contradiction", "neutral", "entailment")


@dataclasses.dataclass(frozen=True)
class ColorOptions:
    """Judges whether a colour's word is the colour of any of the images; "thing" may be so or not."""

    images: int = 1
    classes: tuple[str, ...] = ENTAILMENT
    res: int = 8
    length: int = 4

    abilities: ClassVar[frozenset[Ability]] = frozenset({Ability.IMAGES, Ability.JUDGES})
    reads_start: ClassVar[bool] = True

    def image_shape(self):
        return (self.res, self.res, 3)

    def make(self, rngs):
        return ColorJudge(self)


class ColorJudge(nnx.Module):
    def __init__(self, options):
        self.classes = options.classes
        self.words = nnx.Param(jnp.asarray([*WORDS.values()], jnp.float32), axes=(None,))

    def judge(self, image_BMHWC, text_BKL, *, key=None):
        color_BMC = image_BMHWC.mean(axis=(2, 3))
        named_BKC = (text_BKL[..., :1] == self.words[...].astype(jnp.int32)[None, None]).astype(jnp.float32)
        bright_BC = (color_BMC > 0.5).astype(jnp.float32).max(axis=1)
        dark_BC = (color_BMC < -0.5).astype(jnp.float32).min(axis=1)
        yes_BK, no_BK = (jnp.einsum("bkc,bc->bk", named_BKC, x) for x in (bright_BC, dark_BC))
        maybe_BK = (text_BKL[..., 0] == 7).astype(jnp.float32)
        return jnp.stack([no_BK, maybe_BK, yes_BK] if len(self.classes) == 3 else [no_BK, yes_BK], axis=-1)


def context_for(colors, mesh, options):
    context, _ = context_of(two_towers, colors, mesh)
    blueprint = Blueprint(options)
    return dataclasses.replace(context, model=options, blueprint=blueprint), blueprint.init(jax.random.key(0))


def run(evaluator, colors, mesh, options):
    context, params = context_for(colors, mesh, options)
    with jax.set_mesh(mesh):
        return dict(evaluator.setup(context)(params))


def test_entailment_by_the_class_head(by_word, colors, mesh, tmp_path):
    rows = []
    for i in range(6):
        rows.append({"image_id": f"img{i}", "hypothesis": NAMES[i % 3], "label": "entailment"})
        rows.append({"image_id": f"img{i}", "hypothesis": NAMES[(i + 1) % 3], "label": "contradiction"})
        rows.append({"image_id": f"img{i}", "hypothesis": "thing", "label": "neutral"})
    rows.append({"image_id": "img0", "hypothesis": NAMES[0], "label": "contradiction"})  # Not so.
    (tmp_path / "ve.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluator = Entailment(file=str(tmp_path / "ve.jsonl"), images="colors:test")
    found = run(evaluator, colors, mesh, ColorOptions())
    assert found["count"] == 19 and found["accuracy"] == pytest.approx(18 / 19)
    assert found["accuracy/contradiction"] == pytest.approx(6 / 7) and found["accuracy/neutral"] == 1.0
    assert found["accuracy_blind"] == pytest.approx(6 / 19)  # Grey is no colour; "thing" needs none.
    assert found["majority"] == pytest.approx(7 / 19) and found["auc"] > 0.9 and found["blind"] == 0.5
    confusion = found["confusion"]
    assert confusion.names == [*ENTAILMENT, "other"] and confusion.counts[0, 2] == 1 and confusion.counts.sum() == 19
    with pytest.raises(UserError, match="answer 'neutral', which is none of model.classes"):
        run(evaluator, colors, mesh, ColorOptions(classes=("contradiction", "entailment")))


@pytest.fixture(scope="module")
def pairs(colors, tmp_path_factory):
    """A data set of pairs of colours beside the other, with a statement about each in NLVR2's form."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i, (left, right, said, label) in enumerate(
        [("red", "blue", "red", True), ("blue", "red", "red", True), ("green", "green", "red", False),
         ("blue", "green", "red", True), ("green", "red", "green", True), ("red", "red", "green", False)]
    ):  # fmt: skip
        for k, color in enumerate((left, right)):
            (folder / f"dev-{i // 4}-{i}-img{k}.png").write_bytes(jpeg(COLORS[color]))
        rows.append({"identifier": f"dev-{i // 4}-{i}-0", "sentence": said, "label": str(label)})
    (folder / "dev.json").write_text("\n".join(map(json.dumps, rows)))
    annotated.prepare("nlvr", "nlvr2", {"val": [str(folder / "dev.json")]}, str(folder), str(colors), workers=1)
    return folder


PAIR = ColorOptions(images=2, classes=("False", "True"))


def test_pairs_and_their_consistency(by_word, colors, mesh, pairs):
    """Five of six are right (the fourth label is wrong), so one of two sentences is right throughout."""
    found = run(judge.Judged(name="nlvr"), colors, mesh, PAIR)
    assert found["accuracy"] == pytest.approx(5 / 6) and found["consistency"] == 0.5
    assert found["majority"] == pytest.approx(4 / 6) and found["blind"] == 0.0
    assert found["accuracy/False"] == 1.0 and found["accuracy/True"] == 0.75
    assert run(judge.Judged(name="nlvr", limit=2), colors, mesh, PAIR)["count"] == 2
    for evaluator, options, message in (
        (judge.Judged(name="nlvr"), ColorOptions(classes=("False", "True")), "2 images, and model.images=1"),
        (judge.Judged(name="nlvr"), ColorOptions(images=2), "answer 'True', which is none of model.classes"),
        (judge.Judged(name="nlvr", split="test"), PAIR, "no split 'test'"),
    ):
        with pytest.raises(UserError, match=message):
            run(evaluator, colors, mesh, options)
    context, _ = context_of(two_towers, colors, mesh)
    with pytest.raises(UserError, match="'judge' needs a model with a class head"):
        judge.Judged(name="nlvr").setup(context)


def test_numbers():
    """A tie is wrong; kinds have numbers of their own; sentences of another form are no sentences."""
    said = [judge.Statement("x", i % 2, "k" if i < 2 else "l", f"dev-{i // 2}-{i}-0") for i in range(4)]
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    found = dict(judge.results(said, scores, scores, ("False", "True")))
    assert found["accuracy"] == 0.75 and found["kind/k"] == 1.0 and found["kind/l"] == 0.5
    assert found["consistency"] == 0.5
    assert judge.sentences_of(["dev-0-0-0", "dev-0-1-0", "dev-0-1-1"]) == [[0, 1], [2]]
    assert judge.sentences_of(["dev-0-0-0", "dev-1-0-0"]) == [] == judge.sentences_of(["a", "dev-1-0-0"])


def face(options):
    params = Blueprint(options).init(jax.random.key(0))
    model = LoadedModel(Weights({k: np.asarray(v) for k, v in params.items()}, options), "hand-made")
    model.tokenizer = ByWord()
    return model


def test_the_face(by_word):
    red, blue = jpeg(COLORS["red"]), jpeg(COLORS["blue"])
    one, two = face(ColorOptions()), face(PAIR)
    ((label, scores),) = one.judge(red, "red")
    assert label == "entailment" and set(scores) == set(ENTAILMENT) and sum(scores.values()) == pytest.approx(1)
    assert [label for label, _ in one.judge([red, blue], "blue")] == ["contradiction", "entailment"]
    assert [label for label, _ in one.judge([red, blue], ["red", "red"])] == ["entailment", "contradiction"]
    assert two.judge([red, blue], "blue")[0][0] == "True" and two.judge((red, red), "blue")[0][0] == "False"
    assert [label for label, _ in two.judge([[red, red], [red, blue]], ["blue", "blue"])] == ["False", "True"]
    for model, images, texts, message in (
        (two, [red], "red", "judges pairs: give a list of two images"),
        (two, red, "red", "judges pairs: give a list of two images"),
        (two, [[red, red], [red]], "red", "judges pairs: give a list of two images"),
        (two, [], "red", "judges pairs: give a list of two images"),
        (one, [red, blue], ["red"] * 3, "There are 3 texts for 2 images"),
        (one, red, "", "none of them empty"),
    ):
        with pytest.raises(UserError, match=message):
            model.judge(images, texts)
    options, params = two_towers()
    with pytest.raises(UserError, match="does not have a class head"):
        LoadedModel(Weights(params, options), "towers").judge(red, "red")
