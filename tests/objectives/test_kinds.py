"""Steps that take several kinds of batch, each with its own data, order and share."""

import dataclasses
import shutil
import types
from typing import ClassVar

import jax
import numpy as np
import pytest
from conftest import assert_close

from capvl import recipes, train
from capvl.checkpoint import Checkpointer
from capvl.data.options import DataOptions
from capvl.data.reading.loader import TrainLoader
from capvl.errors import UserError
from capvl.evals import perplexity
from capvl.models.captioner import CaptionerOptions
from capvl.objectives import Kind
from capvl.objectives.cappa import CapPa
from capvl.parallel.mesh import make_mesh

NAME = "test_kinds:TwoTasks"
DATA = "long=scenes/tiny + short=scenes/tiny"


@dataclasses.dataclass(frozen=True)
class TwoTasks:
    """Captions in parallel of half as many images as captions token by token, with a weight."""

    weight: float = 0.25
    share: float = 0.5

    Model: ClassVar[type] = CaptionerOptions
    PARTS: ClassVar = {"long": CapPa(pa=0.0), "short": CapPa(pa=1.0)}

    def check(self, model_options, batch_per_device, micro_batches):
        """Nothing contradicts."""

    def frozen(self, model_options):
        return ()

    def features(self):
        return {"long": Kind(("image", "text")), "short": Kind(("image", "text"), self.share)}

    def transform(self, model_options, data, *, train):
        return {kind: part.transform(model_options, data, train=train) for kind, part in self.PARTS.items()}

    def batch_spec(self, model_options, batch):
        counts = {kind: k.count(batch, kind) for kind, k in self.features().items()}
        return {kind: part.batch_spec(model_options, counts[kind]) for kind, part in self.PARTS.items()}

    def prepare(self, batch, *, train):
        return {kind: part.prepare(batch[kind], train=train) for kind, part in self.PARTS.items()}

    def loss(self, model, batch, key):
        long, metrics = self.PARTS["long"].loss(model, batch["long"], key)
        short, _ = self.PARTS["short"].loss(model, batch["short"], key)
        loss = long + self.weight * short
        return loss, metrics | {"loss": loss, "short": short}

    def flops(self, model_options):
        return (1 + self.share) * CapPa().flops(model_options)


@pytest.fixture
def recipe(tiny):
    def make(**changes):
        return recipes.resolve(tiny(**{"objective": {"name": NAME}, "data__name": DATA} | changes))

    return make


def test_each_kind_is_a_function_of_seed_and_index(recipe, data_dir):
    """What a step takes doesn't hang on the steps before, and of one kind not on the other."""
    r = recipe()
    whole = r.train_loader(r.transforms())
    batches = [next(whole) for _ in range(3)]
    assert {k: len(v["image"]) for k, v in batches[0].items()} == {"long": 16, "short": 8}
    later = r.train_loader(r.transforms(), position=32)
    jax.tree.map(np.testing.assert_array_equal, next(later), batches[2])
    assert later.position == whole.position == 48
    alone = TrainLoader(r.data.kinds()["long"], r.transforms()["long"], ("image", "text"), batch=16, seed=r.seed)
    jax.tree.map(np.testing.assert_array_equal, next(alone), batches[0]["long"])
    # Other orders, though both read the same data set.
    assert not np.array_equal(batches[0]["long"]["image"][:8], batches[0]["short"]["image"])


@pytest.mark.long
def test_resumed_is_uninterrupted(recipe, tmp_path, one_device):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train.run(recipe(steps=4, checkpoint={"every": 2}), str(whole))
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints/4")
    train.run(recipe(steps=4, checkpoint={"every": 2}), str(part))
    (a, step), (b, other) = (Checkpointer(str(workdir)).read_all() for workdir in (whole, part))
    assert step == other == 4
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.long
def test_micro_batches_give_the_same_gradients(recipe):
    """Both kinds are split into as many parts: of each every device keeps its own examples."""
    r = recipe(batch_size=32)
    batch = next(r.train_loader(r.transforms()))
    steps = [dataclasses.replace(r, micro_batches=parts).train_step() for parts in (1, 2)]
    state = jax.jit(steps[0].init_from_seed)()
    found = [jax.jit(step)(state, batch)[1] for step in steps]
    whole, split = ((float(metrics["loss"]), float(metrics["grad_norm"])) for metrics in found)
    assert_close(split, whole, 1e-5)


@pytest.mark.parametrize(
    "name, said",
    [
        ("scenes/tiny", "takes the kinds of batch long, short: data.name should read long=NAME . short=NAME"),
        ("long=scenes/tiny", "takes the kinds of batch long, short"),
        ("long=scenes/tiny + tall=scenes/tiny", "takes the kinds of batch long, short"),
        ("long=scenes/tiny + long=scenes/tiny", "with each kind once"),
        ("scenes/tiny + long=scenes/tiny", "should read KIND=DATA"),
    ],
)
def test_kinds_that_data_does_not_have(recipe, tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        train.run(recipe(data__name=name), str(tmp_path / "run"))
    assert not (tmp_path / "run/checkpoints").exists()


def test_one_kind_takes_none(tiny, tmp_path):
    with pytest.raises(UserError, match="takes no kinds of batch: data.name should read NAME"):
        train.run(recipes.resolve(tiny(data__name="pairs=scenes/tiny")), str(tmp_path / "run"))


def test_a_share_that_is_no_whole_batch(recipe, tmp_path):
    with pytest.raises(
        UserError, match="batch_size=16 times the share 0.3 of 'short' is no whole batch; take a multiple of 10"
    ):
        train.run(recipe(objective={"name": NAME, "share": 0.3}), str(tmp_path / "run"))


def test_one_tokenizer_whatever_the_order_of_the_kinds(recipe, data_dir):
    """Training and evaluators take that of the first data set that is named."""
    r = recipe(data__name="short=stream:/a/0.tar + long=scenes/tiny")
    with pytest.raises(UserError, match="a stream has none of its own"):
        r.tokenizer()
    with pytest.raises(UserError, match="a stream has none of its own"):
        r.transforms()
    r = recipe(data__name="short=scenes/tiny + long=stream:/a/0.tar")
    assert {t.tokenizer.path for t in r.transforms().values()} == {r.tokenizer().path}


def test_unigrams_of_a_stream_among_kinds_are_even():
    data = DataOptions(name="pairs=stream:/a/0.tar + regions=scenes/tiny")
    context = types.SimpleNamespace(data=data, model=types.SimpleNamespace(vocab=4))
    np.testing.assert_allclose(perplexity.unigram(context), np.log(0.25))


def test_the_check_of_kinds_says_which(recipe):
    r = recipe(batch_size=8)
    with pytest.raises(UserError, match="4 examples of 'short' a step don't divide over 8 .* nearest that does is 8"):
        r.check(make_mesh(r.mesh))


def test_a_stream_beside_a_mixture(tmp_path, recipe):
    data = recipe(data__name="long=stream:/a/{0..1}+x=y.tar + short=scenes/tiny*0.5 + flickr8k").data
    assert {k: v.name for k, v in data.kinds().items()} == {
        "long": "stream:/a/{0..1}+x=y.tar",
        "short": "scenes/tiny*0.5 + flickr8k",
    }
