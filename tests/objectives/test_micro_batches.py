"""Gradient accumulation changes nothing: every objective's loss, metrics and gradient are those of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_MODEL, assert_close

from capvl.errors import UserError
from capvl.objectives import OBJECTIVES, Mean
from capvl.objectives.cappa import CapPa
from capvl.objectives.contrastive import Contrastive
from capvl.objectives.git import Git
from capvl.objectives.glip import Glip
from capvl.objectives.judge import Judge
from capvl.objectives.probe import Probe
from capvl.objectives.transfer import Transfer
from capvl.objectives.xvlm_answers import XVlmAnswering
from capvl.objectives.xvlm_caption import XVlmCaption
from capvl.optim.optimizer import OptimizerOptions
from capvl.optim.schedules import ScheduleOptions
from capvl.step import TrainStep, _means

GIT = dict(encoder="w16d2h2m32/8", res=16, text="w24d2h2m32", vocab=40, start=2, length=8, dtype="float32", dropout=0.0)
FUSED = dict(encoder="w16d2h2m32/8", res=16, text="w16d2h2m32", cross_layers=1, vocab=40, length=8, text_positions=16)
FUSED |= dict(dtype="float32", dropout=0.0)
GLIP = dict(encoder="w16d1h2m32/8", res=32, max_side=32, pad_windows=False, level_norms=False, pixels="half", width=16)
GLIP |= dict(
    blocks=1, groups=2, fusion_width=16, fusion_heads=2, text="w16d1h2m32", vocab=40, length=8, text_positions=8
)
GLIP |= dict(dtype="float32", dropout=0.0, contrast=8, offsets="none")
PROBE = dict(encoder="w16d2h2m32/8", res=16, classes=5, heads=2, dtype="float32")
CASES = {
    "cappa": [(CapPa(pa=pa, average=average), TINY_MODEL) for pa in (0.0, 1.0) for average in ("example", "token")],
    "git": [(Git(), GIT), (Git(texts=2), GIT), (Git(kind="masked", mask_ratio=1.0, mask_id=3), GIT)],
    "glip": [(Glip(slots=3, contrastive=1.0), GLIP)],
    "judge": [(Judge(texts=2), FUSED | dict(classes=("a", "b", "c")))],
    "xvlm_answers": [(XVlmAnswering(answers=2), FUSED | dict(question_length=8, start=2, end=3))],
    "xvlm_caption": [(XVlmCaption(), FUSED | dict(start=2, words=""))],
    "transfer": [(Transfer(locked=False), TINY_MODEL)],
    "probe": [(Probe(locked=False), PROBE)],
}
# What these optimise is no mean over examples, or is drawn in the step.
OTHERS = {"contrastive", "scst", "text_assignment", "xvlm", "xvlm_scst"}
ROWS = 16


def test_every_objective_is_here():
    assert CASES.keys() | OTHERS == OBJECTIVES.keys()


def batch_of(objective, options) -> dict[str, np.ndarray]:
    """Texts whose lengths grow along the batch, so that its parts hold very different numbers of tokens."""
    rng, batch = np.random.default_rng(0), {}
    for name, spec in objective.batch_spec(options, ROWS).items():
        if name in ("text", "question", "answer"):
            length = spec.shape[-1]
            lengths = np.linspace(1, length, int(np.prod(spec.shape[:-1]))).astype(int).reshape(spec.shape[:-1])
            ids = rng.integers(4, options.vocab - 4, spec.shape)
            batch[name] = np.where(np.arange(length) < lengths[..., None], ids, 0).astype(np.int32)
        elif name == "label":
            classes = options.classes if isinstance(options.classes, int) else len(options.classes)
            batch[name] = rng.integers(0, classes, spec.shape).astype(np.int32)
        elif name == "box":
            batch[name] = np.sort(rng.random(spec.shape), axis=-1)[..., [0, 1, 2, 3]].astype(np.float32)
        elif name in ("positive", "slots"):
            batch[name] = rng.random(spec.shape) < 0.5
        elif spec.dtype == np.uint8:
            batch[name] = rng.integers(0, 256, spec.shape).astype(np.uint8)
        else:
            batch[name] = np.full(spec.shape, name in ("mask", "has_image", "weight"), spec.dtype)
    return batch


LONG = ("glip",)  # In the short run test_glip.py has its losses of parts of a batch.


@pytest.mark.parametrize(
    "name, number",
    [
        pytest.param(name, i, marks=[pytest.mark.long] if name in LONG else [])
        for name, rows in CASES.items()
        for i in range(len(rows))
    ],
)
def test_parts_are_the_whole(name, number):
    objective, values = CASES[name][number]
    options = objective.Model(**values)

    def gradients(micro_batches):
        step = TrainStep(
            objective, options, OptimizerOptions(), ScheduleOptions(warmup=0), 10, micro_batches=micro_batches
        )
        rng = np.random.default_rng(1)
        params = {k: 0.2 * rng.normal(size=v.shape).astype(np.float32) for k, v in step.blueprint.shapes.items()}

        @jax.jit
        def run(params, batch):
            prepared = objective.prepare(batch, train=True)
            trainable = {k: v for k, v in params.items() if k in step.trainable}
            return step._gradients(trainable, params, prepared, jax.random.key(0))

        return run(params, batch_of(objective, options))

    whole, parts = gradients(1), gradients(4)
    assert parts[1].keys() == whole[1].keys()
    for key, value in whole[1].items():
        if key not in ("best", "accuracy"):  # Of the head that is best, which may be another one in each part.
            assert_close(parts[1][key], value, 1e-5, key)
    for key, value in whole[0].items():
        assert_close(parts[0][key], value, 1e-4, key)


def test_a_mean_is_divided_once():
    added = {"nll": Mean(jnp.float32(6.0), jnp.float32(4.0)), "none": Mean(jnp.float32(0.0), jnp.float32(0.0))}
    found = _means(added | {"loss": jnp.float32(6.0)}, 2)
    assert {k: float(v) for k, v in found.items()} == {"nll": 1.5, "none": 0.0, "loss": 3.0}


def test_a_contrastive_loss_is_not_split():
    with pytest.raises(UserError, match="micro_batches=2"):
        Contrastive().check(Contrastive.Model(**TINY_MODEL | {"decoder_layers": 0}), 8, 2)
