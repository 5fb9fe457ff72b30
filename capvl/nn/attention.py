"""Multi-head attention: fused QKV self-attention and cross-attention to given keys and values.

softmax(q kᵀ / sqrt(K)) v with the softmax in float32; layout (B, T, H, K). cuDNN's kernel on
GPUs, JAX's splash kernel on TPUs for long sequences, else XLA with a backward pass of our own.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.nn import splash, weights
from capvl.nn.layers import Dense, clip, drop

_LEAST_ODD = 64
"""Queries from which odd lengths go to cuDNN."""


def attend(q_BTHK, k_BSHK, v_BSHK, *, mask=None, causal: bool = False) -> jax.Array:
    """Scaled dot-product attention.

    Args:
      q_BTHK, k_BSHK, v_BSHK: queries, keys, values. Keys and values may have B / g rows: each is seen by g consecutive
        rows of the queries.
      mask: optional boolean, broadcastable to (B, H, T, S); False hides a key.
      causal: position t sees keys 0..t only.

    Returns:
      (B, T, H, K) in the queries' dtype.
    """
    if k_BSHK.shape[0] != q_BTHK.shape[0]:
        mask = _causal_mask(q_BTHK, k_BSHK, mask) if causal else mask
        return _attend_to_shared(q_BTHK, k_BSHK, v_BSHK, mask)
    even = q_BTHK.shape[1] % 2 == k_BSHK.shape[1] % 2 == 0
    # A place more copies keys and values: it paid with 77 queries, and would not for the one of a written token.
    pays = even or q_BTHK.shape[1] >= _LEAST_ODD
    if jax.default_backend() == "gpu" and q_BTHK.dtype in (jnp.bfloat16, jnp.float16) and mask is None and pays:
        return _cudnn_attention(q_BTHK, k_BSHK, v_BSHK, causal)
    if mask is None and splash.pays(q_BTHK, k_BSHK):
        return splash.attend(q_BTHK, k_BSHK, v_BSHK, causal=causal)
    mask = _causal_mask(q_BTHK, k_BSHK, mask) if causal else mask
    return _softmax_attention(q_BTHK, k_BSHK, v_BSHK, mask)


def _causal_mask(q_BTHK, k_BSHK, mask) -> jax.Array:
    """`mask` without keys behind the query's place."""
    before_TS = jnp.tril(jnp.ones((q_BTHK.shape[1], k_BSHK.shape[1]), bool))[None, None]
    return before_TS if mask is None else mask & before_TS


def _attend_to_shared(q_BTHK, k_BSHK, v_BSHK, mask) -> jax.Array:
    """The queries of rows that see the same keys, one behind the other as one row's."""
    rows, (batch, length) = k_BSHK.shape[0], q_BTHK.shape[:2]
    if mask is not None and mask.shape[0] > 1:
        seen_BHTS = jnp.broadcast_to(mask, (batch, mask.shape[1], length, mask.shape[3]))
        seen = seen_BHTS.reshape(rows, batch // rows, *seen_BHTS.shape[1:]).swapaxes(1, 2)
        mask = seen.reshape(rows, mask.shape[1], -1, mask.shape[3])
    elif mask is not None and mask.shape[2] > 1:
        mask = jnp.tile(mask, (1, 1, batch // rows, 1))
    queries = q_BTHK.reshape(rows, -1, *q_BTHK.shape[2:])
    return attend(queries, k_BSHK, v_BSHK, mask=mask).reshape(q_BTHK.shape)


def _cudnn_attention(q_BTHK, k_BSHK, v_BSHK, causal: bool) -> jax.Array:
    """cuDNN's kernel, which trains with even lengths only: an odd one gets a place more, which is hidden as a key."""
    length, keys = q_BTHK.shape[1], k_BSHK.shape[1]
    q_BTHK, k_BSHK, v_BSHK = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) if x.shape[1] % 2 else x
        for x in (q_BTHK, k_BSHK, v_BSHK)
    )
    real_B = jnp.full(q_BTHK.shape[:1], keys, jnp.int32) if keys % 2 else None
    out_BTHK = jax.nn.dot_product_attention(
        q_BTHK, k_BSHK, v_BSHK, is_causal=causal, key_value_seq_lengths=real_B, implementation="cudnn"
    )
    return out_BTHK[:, :length]


@jax.custom_vjp
def _softmax_attention(q_BTHK, k_BSHK, v_BSHK, mask):
    return _attention_forward(q_BTHK, k_BSHK, v_BSHK, mask)[0]


def _attention_forward(q_BTHK, k_BSHK, v_BSHK, mask):
    """Keeps exp(logits - maximum) in the activations' dtype; its sum divides the output, not the weights."""
    scale = q_BTHK.shape[-1] ** -0.5
    logits_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK * scale, k_BSHK, preferred_element_type=jnp.float32)
    if mask is not None:
        logits_BHTS = jnp.where(mask, logits_BHTS, jnp.finfo(jnp.float32).min)
    peak_BHT1 = checkpoint_name(logits_BHTS.max(axis=-1, keepdims=True), "softmax")
    exp_BHTS = jnp.exp(logits_BHTS - peak_BHT1)
    inverse_BTH1 = checkpoint_name(jnp.swapaxes(1 / exp_BHTS.sum(axis=-1), 1, 2)[..., None], "softmax")
    exp_BHTS = exp_BHTS.astype(v_BSHK.dtype)
    mixed_BTHK = jnp.einsum("bhts,bshk->bthk", exp_BHTS, v_BSHK, preferred_element_type=jnp.float32)
    mixed_BTHK = checkpoint_name((mixed_BTHK * inverse_BTH1).astype(q_BTHK.dtype), "attention")
    return mixed_BTHK, (q_BTHK, k_BSHK, v_BSHK, exp_BHTS, inverse_BTH1, mixed_BTHK)


def _attention_backward(saved, gradient_BTHK):
    """d logits = weights * (d weights - sum over keys of weights * d weights), and that sum is gradient . output."""
    q_BTHK, k_BSHK, v_BSHK, exp_BHTS, inverse_BTH1, mixed_BTHK = saved
    dtype, scale = q_BTHK.dtype, q_BTHK.shape[-1] ** -0.5
    gradient_f32 = gradient_BTHK.astype(jnp.float32) * inverse_BTH1
    along_BHT1 = jnp.swapaxes((gradient_f32 * mixed_BTHK.astype(jnp.float32)).sum(-1), 1, 2)[..., None]
    gradient_BTHK = gradient_f32.astype(dtype)
    dexp_BHTS = jnp.einsum("bthk,bshk->bhts", gradient_BTHK, v_BSHK, preferred_element_type=jnp.float32)
    dlogits_BHTS = (exp_BHTS.astype(jnp.float32) * (dexp_BHTS - along_BHT1)).astype(dtype)
    dq_BTHK = jnp.einsum("bhts,bshk->bthk", dlogits_BHTS, k_BSHK) * scale
    dk_BSHK = jnp.einsum("bhts,bthk->bshk", dlogits_BHTS, q_BTHK) * scale
    dv_BSHK = jnp.einsum("bhts,bthk->bshk", exp_BHTS, gradient_BTHK)
    return dq_BTHK, dk_BSHK, dv_BSHK, None


_softmax_attention.defvjp(_attention_forward, _attention_backward)


def attend_jointly(
    q_BTHK, parts, *, dropout: float = 0.0, key: jax.Array | None = None, limit: float = 0.0
) -> jax.Array:
    """Attention by one softmax over the keys of several parts, which are never put side by side.

    Args:
      q_BTHK: queries.
      parts: (k, v, mask) of each, mask None or boolean and broadcastable to (B, H, T, S). A part may have B / g rows:
        each is seen by g consecutive rows of the queries.
      dropout: share of the softmax's weights that is dropped where there is a `key`.
      limit: logits are clipped to ±limit; 0 for not.

    Returns:
      (B, T, H, K) in the queries' dtype.
    """
    batch, length, heads, width = q_BTHK.shape
    scaled = q_BTHK * width**-0.5
    logits = []
    for keys, _, mask in parts:
        rows = keys.shape[0]
        grouped = scaled.reshape(rows, batch // rows * length, heads, width)
        part = clip(jnp.einsum("bthk,bshk->bhts", grouped, keys, preferred_element_type=jnp.float32), limit)
        part = part.reshape(rows, heads, batch // rows, length, -1).swapaxes(1, 2).reshape(batch, heads, length, -1)
        logits.append(part if mask is None else jnp.where(mask, part, jnp.finfo(jnp.float32).min))
    weights_BHTS = jax.nn.softmax(jnp.concatenate(logits, axis=-1))
    if key is not None:
        weights_BHTS = drop(weights_BHTS, dropout, key)
    weights_BHTS = weights_BHTS.astype(q_BTHK.dtype)
    mixed, first = jnp.zeros(q_BTHK.shape, jnp.float32), 0
    for _, values, _ in parts:
        rows, size = values.shape[:2]
        part = jax.lax.slice_in_dim(weights_BHTS, first, first + size, axis=3)
        part = part.reshape(rows, batch // rows, heads, length, size).swapaxes(1, 2).reshape(rows, heads, -1, size)
        part = jnp.einsum("bhts,bshk->bthk", part, values, preferred_element_type=jnp.float32)
        mixed, first = mixed + part.reshape(q_BTHK.shape), first + size
    return checkpoint_name(mixed.astype(q_BTHK.dtype), "attention")


def attend_with_dropout(
    q_BTHK,
    k_BSHK,
    v_BSHK,
    *,
    mask=None,
    causal: bool = False,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    limit: float = 0.0,
) -> jax.Array:
    """`attend`, or `attend_jointly` where weights are dropped (there is a `key`) or logits have a limit."""
    if (key is None or not dropout) and not limit:
        return attend(q_BTHK, k_BSHK, v_BSHK, mask=mask, causal=causal)
    mask = _causal_mask(q_BTHK, k_BSHK, mask) if causal else mask
    return attend_jointly(q_BTHK, [(k_BSHK, v_BSHK, mask)], dropout=dropout, key=key, limit=limit)


def output_projection(width: int, heads: int, *, bias: bool, init=None, rngs: nnx.Rngs) -> Dense:
    """The (H, K, D) projection after attention."""
    return Dense(
        (heads, width // heads, width),
        ("heads", None, "embed"),
        init or weights.xavier_uniform(width, width),
        contract=2,
        bias=(width,) if bias else None,
        rngs=rngs,
    )


def input_projection(width: int, heads: int, parts: int, *, bias: bool, init=None, rngs: nnx.Rngs) -> Dense:
    """`parts` projections (D -> H, K) fused in one kernel (D, parts, H, K): 3 for QKV, 2 for KV, 1 for Q."""
    shape = (parts, heads, width // heads)
    return Dense(
        (width, *shape),
        ("embed", None, "heads", None),
        init or weights.xavier_uniform(width, width),
        bias=shape if bias else None,
        rngs=rngs,
    )


class SelfAttention(nnx.Module):
    """Self-attention with one fused QKV kernel: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int, *, bias: bool = True, init=None, rngs: nnx.Rngs):
        self.qkv = input_projection(width, heads, 3, bias=bias, init=init, rngs=rngs)
        self.out = output_projection(width, heads, bias=bias, init=init, rngs=rngs)

    def project(self, x_BTD) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each (B, T, H, K)."""
        qkv_BTcHK = checkpoint_name(self.qkv(x_BTD), "qkv")
        return qkv_BTcHK[:, :, 0], qkv_BTcHK[:, :, 1], qkv_BTcHK[:, :, 2]

    def __call__(self, x_BTD, *, mask=None, causal: bool = False) -> jax.Array:
        return self.out(attend(*self.project(x_BTD), mask=mask, causal=causal))

    def step(self, x_B1D, cache: tuple[jax.Array, jax.Array], index) -> tuple[jax.Array, tuple]:
        """One decoding step: writes key and value at `index` of the (B, L, H, K) caches and attends to 0..index."""
        q, *cache, mask = self.append_to_cache(x_B1D, cache, index)
        return self.out(attend(q, *cache, mask=mask)), tuple(cache)

    def append_to_cache(self, x_B1D, cache, index):
        """The query, the caches with this step's key and value, and the mask (1, 1, 1, L) of 0..index."""
        q, k, v = self.project(x_B1D)
        keys = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), index, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), index, axis=1)
        return q, keys, values, (jnp.arange(keys.shape[1]) <= index)[None, None, None, :]


class CrossAttention(nnx.Module):
    """Attention from text positions to keys and values that the caller computed."""

    def __init__(self, width: int, heads: int, *, bias: bool = True, init=None, rngs: nnx.Rngs):
        self.q = input_projection(width, heads, 1, bias=bias, init=init, rngs=rngs)
        self.out = output_projection(width, heads, bias=bias, init=init, rngs=rngs)

    def __call__(self, x_BTD, k_BNHK, v_BNHK, *, mask=None) -> jax.Array:
        """Keys, values and `mask` are those of `attend`."""
        q_BTHK = checkpoint_name(self.q(x_BTD)[:, :, 0], "cross_q")
        return self.out(attend(q_BTHK, k_BNHK, v_BNHK, mask=mask))
