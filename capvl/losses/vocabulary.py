"""Cross-entropy over a large vocabulary without ever holding (B, L, V) logits.

The loss is linear in the per-token losses with weights that are known beforehand, so its
gradient is computed in the forward pass, chunk by chunk, while a chunk's logits are there:
nothing is recomputed and the largest temporary is (chunk, V). Tokens of weight 0 (padding)
are sorted behind the others and chunks without any other are never computed. Both the loss
and its gradients are exact.
"""

import functools

import jax
import jax.numpy as jnp

from capvl.parallel.rules import constrain, data_groups


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def vocabulary_loss(hidden_BLD, labels_BL, weights_BL, kernel_DV, bias_V, smoothing=0.0, chunk=1024, tell_right=False):
    """Weighted sum of token cross-entropies of hidden @ kernel + bias.

    With label smoothing s the target is 1 - s on the label and s / (V - 1) on each other class
    (big_vision's form: no entropy offset is subtracted).

    Args:
      hidden_BLD: last hidden states, float32 or bfloat16.
      labels_BL: int32 ids below V.
      weights_BL: float32; a position of weight 0 is not computed. Not differentiated.
      kernel_DV, bias_V: the float32 output layer.
      smoothing: label smoothing s.
      chunk: tokens at a time on each device.
      tell_right: also give for which tokens the label is the likeliest class.

    Returns:
      The scalar sum of weight * nll (differentiable), nll (B, L) in nats, 0 where the weight is 0 (not
      differentiable), and with `tell_right` bool (B, L), False where the weight is 0.
    """
    return _evaluate(hidden_BLD, labels_BL, weights_BL, kernel_DV, bias_V, smoothing, chunk, tell_right, False)[0]


def _evaluate(hidden_BLD, labels_BL, weights_BL, kernel_DV, bias_V, smoothing, chunk, tell_right, with_gradient):
    """((loss, nll_BL[, right_BL]), gradients or None); G groups of tokens, one a device, never mix."""
    b, length, width = hidden_BLD.shape
    vocab = kernel_DV.shape[1]
    groups = data_groups() if b % data_groups() == 0 else 1
    tokens = b // groups * length
    chunk = min(chunk, tokens)
    padded = -(-tokens // chunk) * chunk
    kernel = kernel_DV.astype(hidden_BLD.dtype)

    order_GT = jnp.argsort((weights_BL.reshape(groups, tokens) == 0).astype(jnp.int32), axis=1, stable=True)
    labels_GT, weights_GT, hidden_GTD = (_gather(x, order_GT, padded) for x in (labels_BL, weights_BL, hidden_BLD))
    hidden_GTD = constrain(hidden_GTD, "groups", None, None)
    live = jnp.max(jnp.sum(weights_GT != 0, axis=1))

    def body(i, carry):
        nll_GT, right_GT, grads = carry
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * chunk, slice_size=chunk, axis=1)
        hidden, labels, weights = cut(hidden_GTD), cut(labels_GT), cut(weights_GT)
        nll, right, dlogits = _chunk_nll(hidden, labels, weights, kernel, bias_V, smoothing)
        nll_GT = jax.lax.dynamic_update_slice_in_dim(nll_GT, nll, i * chunk, axis=1)
        if tell_right:
            right_GT = jax.lax.dynamic_update_slice_in_dim(right_GT, right, i * chunk, axis=1)
        if not with_gradient:
            return nll_GT, right_GT, grads
        dhidden_GTD, dkernel_GDV, dbias_GV = grads
        dbias_GV = dbias_GV + dlogits.sum(axis=1)
        dlogits = dlogits.astype(hidden.dtype)
        dhidden = jnp.einsum("gcv,dv->gcd", dlogits, kernel)
        dhidden_GTD = jax.lax.dynamic_update_slice_in_dim(dhidden_GTD, dhidden, i * chunk, axis=1)
        dkernel = jnp.einsum("gcd,gcv->gdv", hidden, dlogits, preferred_element_type=jnp.float32)
        return nll_GT, right_GT, (dhidden_GTD, constrain(dkernel_GDV + dkernel, "groups", None, "vocab"), dbias_GV)

    grads = None
    if with_gradient:
        grads = (
            jnp.zeros_like(hidden_GTD),
            constrain(jnp.zeros((groups, width, vocab), jnp.float32), "groups", None, "vocab"),
            jnp.zeros((groups, vocab), jnp.float32),
        )
    right_GT = jnp.zeros((groups, padded), bool) if tell_right else None
    start = (jnp.zeros((groups, padded), jnp.float32), right_GT, grads)
    # A loop of data-dependent length; capvl.planning.work reads its bound from the scope's name.
    with jax.named_scope(f"at_most_{padded // chunk}_times"):
        nll_GT, right_GT, grads = jax.lax.fori_loop(0, -(-live // chunk), body, start)

    back_GT = jnp.argsort(order_GT, axis=1)

    def in_order(x_GT, blank):
        x_BL = jnp.take_along_axis(x_GT[:, :tokens], back_GT, axis=1).reshape(b, length)
        return jnp.where(weights_BL != 0, x_BL, blank)

    nll_BL = in_order(nll_GT, 0.0)
    told = (in_order(right_GT, False),) if tell_right else ()
    if with_gradient:
        dhidden_BLD = jnp.take_along_axis(grads[0][:, :tokens], back_GT[:, :, None], axis=1)
        grads = (dhidden_BLD.reshape(b, length, width), grads[1].sum(axis=0), grads[2].sum(axis=0))
    return (jnp.sum(nll_BL * weights_BL), nll_BL, *told), grads


def _gather(x_BL, order_GT, padded: int):
    """What belongs to tokens, (B, L, …), in groups and in their order, with zeros behind: (G, padded, …)."""
    groups, tokens = order_GT.shape
    x = x_BL.reshape(groups, tokens, *x_BL.shape[2:])
    extra = (1,) * (x.ndim - 2)
    x = jnp.take_along_axis(x, order_GT.reshape(groups, tokens, *extra), axis=1)
    return jnp.pad(x, ((0, 0), (0, padded - tokens), *((0, 0),) * len(extra)))


def _chunk_nll(hidden_GCD, labels_GC, weights_GC, kernel_DV, bias_V, smoothing):
    """Token losses (G, C) of one chunk, whether the label is likeliest, and weight * d nll / d logits (G, C, V)."""
    vocab = kernel_DV.shape[1]
    logits_GCV = jnp.einsum("gcd,dv->gcv", hidden_GCD, kernel_DV, preferred_element_type=jnp.float32)
    logits_GCV = logits_GCV + bias_V[None, None]
    peak = logits_GCV.max(axis=-1, keepdims=True)
    exp = jnp.exp(logits_GCV - peak)
    total = exp.sum(axis=-1, keepdims=True)
    log_total = (peak + jnp.log(total))[..., 0]
    label_logit = jnp.take_along_axis(logits_GCV, labels_GC[..., None], axis=-1)[..., 0]
    other = smoothing / (vocab - 1)
    nll = log_total - (1 - smoothing - other) * label_logit
    if smoothing:
        nll = nll - other * logits_GCV.sum(axis=-1)
    is_label = jax.lax.broadcasted_iota(jnp.int32, logits_GCV.shape, 2) == labels_GC[..., None]
    dlogits = exp / total - jnp.where(is_label, 1 - smoothing, other)
    return nll, label_logit >= peak[..., 0], dlogits * weights_GC[..., None]


def _forward(hidden_BLD, labels_BL, weights_BL, kernel_DV, bias_V, smoothing, chunk, tell_right):
    return _evaluate(hidden_BLD, labels_BL, weights_BL, kernel_DV, bias_V, smoothing, chunk, tell_right, True)


def _backward(smoothing, chunk, tell_right, grads, cotangents):
    scale = cotangents[0]
    dhidden_BLD, dkernel_DV, dbias_V = grads
    return dhidden_BLD * scale.astype(dhidden_BLD.dtype), None, None, dkernel_DV * scale, dbias_V * scale


vocabulary_loss.defvjp(_forward, _backward)
