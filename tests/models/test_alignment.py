"""What places tell of tokens, boxes and centerness; the official numbers are in test_glip_golden.py."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_glip import close

from capvl.models.alignment import AlignmentHead
from capvl.models.deep_fusion import LIMIT


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    levels = [jnp.asarray(rng.normal(size=(2, n, n, 6)), dtype) for n in (3, 2)]
    return levels, jnp.asarray(rng.normal(size=(2, 4, 5)), dtype)


def test_a_new_head_gives_every_pair_a_hundredth():
    found = AlignmentHead(6, 5, 2, rngs=nnx.Rngs(0)).tokens(inputs()[1])[1]
    close(jax.nn.sigmoid(found), np.full((2, 4), 0.01), 1e-6)


def test_padding_without_an_embedding_has_finite_gradients():
    head, (levels, states) = AlignmentHead(6, 5, 2, rngs=nnx.Rngs(0)), inputs()
    states = states.at[1, 2:].set(0.0)

    def total(states):
        return head(levels, states).logits_BNL.sum()

    gradient = jax.grad(total)(states)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_logits_have_a_limit_and_are_float32():
    head, (levels, states) = AlignmentHead(6, 5, 2, rngs=nnx.Rngs(0)), inputs(jnp.bfloat16)
    found = head(levels, states)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    head.log_scale[...] = jnp.full(1, -20.0)
    assert np.abs(head(levels, states).logits_BNL).max() == LIMIT


def test_each_level_has_a_scale_of_its_own():
    head, (levels, states) = AlignmentHead(6, 5, 2, rngs=nnx.Rngs(0)), inputs()
    before = head(levels, states).deltas_BN4
    head.box_scale[...] = jnp.asarray([1.0, 3.0])
    after = head(levels, states).deltas_BN4
    np.testing.assert_array_equal(after[:, :9], before[:, :9])
    close(after[:, 9:], before[:, 9:] * 3, 1e-6)
