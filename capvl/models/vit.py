"""Vision Transformer encoder (arXiv 2010.11929), pre-LN, with mean, MAP or class-token pooling.

The trunk's arithmetic is that of CapPa's reference; registers are from arXiv 2309.16588 and
patch dropout from arXiv 2212.00794 (FLIP).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.models.sizes import Size
from capvl.nn import positions, weights
from capvl.nn.attention import CrossAttention, SelfAttention, input_projection
from capvl.nn.layers import Dense, LayerNorm, Mlp
from capvl.nn.stack import scan, stack
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain


class EncoderBlock(nnx.Module):
    """x += Attention(LN x); x += MLP(LN x)."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(size.width, rngs=rngs)
        self.attn = SelfAttention(size.width, size.heads, rngs=rngs)
        self.norm2 = LayerNorm(size.width, rngs=rngs)
        self.mlp = Mlp(size.width, size.mlp, rngs=rngs)

    def __call__(self, x_BND) -> jax.Array:
        x_BND = checkpoint_name(x_BND + self.attn(self.norm1(x_BND)), "residual")
        x_BND = x_BND + self.mlp(self.norm2(x_BND))
        return constrain(x_BND, "batch", None, None)


class MapHead(nnx.Module):
    """Multi-head attention pooling: one probe attends to all tokens, then x + MLP(LN x): (B, N, D) -> (B, D)."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.probe = weight(rngs, (1, size.width), (None, None), weights.xavier_uniform(1, size.width))
        self.kv = input_projection(size.width, size.heads, 2, bias=True, rngs=rngs)
        self.attn = CrossAttention(size.width, size.heads, rngs=rngs)
        self.norm = LayerNorm(size.width, rngs=rngs)
        self.mlp = Mlp(size.width, size.mlp, rngs=rngs)

    def __call__(self, tokens_BND) -> jax.Array:
        kv_BNcHK = self.kv(tokens_BND)
        probe_B1D = jnp.broadcast_to(
            self.probe[...].astype(tokens_BND.dtype)[None], (tokens_BND.shape[0], 1, tokens_BND.shape[-1])
        )
        x_B1D = self.attn(probe_B1D, kv_BNcHK[:, :, 0], kv_BNcHK[:, :, 1])
        return (x_B1D + self.mlp(self.norm(x_B1D)))[:, 0]


class ViT(nnx.Module):
    """Images (B, R, R, 3) in [-1, 1] -> tokens (B, N, D) after the final LN.

    Args:
      size, patch, res: width and depth; patch and image side in pixels (`res` a multiple of `patch`).
      pool: "mean", "map" or "cls" (a class token is put first, after the positions).
      positions_kind: "learned" or "sincos".
      registers: extra learned tokens that the blocks see and the output drops.
      patch_dropout: share of patches dropped in training.
      remat, unroll: see `capvl.nn.stack.scan`.
    """

    def __init__(
        self,
        size: Size,
        patch: int,
        res: int,
        *,
        pool: str = "mean",
        positions_kind: str = "learned",
        registers: int = 0,
        patch_dropout: float = 0.0,
        remat: str = "none",
        unroll: bool = False,
        rngs: nnx.Rngs,
    ):
        self.patch, self.pool_kind, self.registers_count = patch, pool, registers
        self.patch_dropout, self.remat, self.unroll = patch_dropout, remat, unroll
        grid, width = res // patch, size.width
        self.grid, self.positions_kind = grid, positions_kind
        self.stem = Dense(
            (patch, patch, 3, width),
            (None, None, None, "embed"),
            weights.lecun_normal(patch * patch * 3),
            contract=3,
            bias=(width,),
            rngs=rngs,
        )
        if positions_kind == "learned":
            self.positions = weight(rngs, (grid * grid, width), (None, "embed"), weights.normal(width**-0.5))
        self.cls = weight(rngs, (1, width), (None, None), weights.zeros) if pool == "cls" else None
        self.registers = weight(rngs, (registers, width), (None, None), weights.normal(0.02)) if registers else None
        self.blocks = stack(lambda r: EncoderBlock(size, r), size.depth, rngs)
        self.norm = LayerNorm(width, rngs=rngs)
        self.map = MapHead(size, rngs) if pool == "map" else None

    def embed(self, image_BRRC, dtype) -> jax.Array:
        """Patch embedding without positions: (B, N, D), patches row by row."""
        b, height, width, channels = image_BRRC.shape
        p = self.patch
        patches = image_BRRC.astype(dtype).reshape(b, height // p, p, width // p, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p, p, channels)
        return self.stem(patches)

    def add_positions(self, x_BND) -> jax.Array:
        """Adds the position embedding."""
        if self.positions_kind == "learned":
            table = self.positions[...]
        else:
            table = jnp.asarray(positions.sincos_2d(self.grid, self.grid, x_BND.shape[-1]))
        return x_BND + table.astype(x_BND.dtype)[None]

    def __call__(self, image_BRRC, *, dtype=jnp.float32, key: jax.Array | None = None) -> jax.Array:
        """Encodes images; a `key` means training and turns patch dropout on."""
        x = self.add_positions(self.embed(image_BRRC, dtype))
        if self.patch_dropout and key is not None:
            x = _drop_patches(x, self.patch_dropout, key)
        prefix = [p[...].astype(dtype) for p in (self.cls, self.registers) if p is not None]
        if prefix:
            table = jnp.concatenate(prefix)
            x = jnp.concatenate([jnp.broadcast_to(table[None], (x.shape[0], *table.shape)), x], axis=1)
        x = constrain(x, "batch", None, None)
        x = scan(self.blocks, lambda block, h, _: block(h), x, remat=self.remat, unroll=self.unroll)
        if self.registers is not None:
            first = 0 if self.cls is None else 1
            x = jnp.concatenate([x[:, :first], x[:, first + self.registers_count :]], axis=1)
        return self.norm(x)

    def pool(self, tokens_BND) -> jax.Array:
        """The pooled feature (B, D) of encoded tokens."""
        if self.pool_kind == "map":
            return self.map(tokens_BND)
        if self.pool_kind == "cls":
            return tokens_BND[:, 0]
        return tokens_BND.mean(axis=1)


def _drop_patches(x_BND, rate: float, key) -> jax.Array:
    """Keeps a random (1 - rate) of each image's tokens, in order."""
    b, n, _ = x_BND.shape
    keep = max(1, round(n * (1 - rate)))
    noise = jax.random.uniform(key, (b, n))
    kept = jnp.sort(jnp.argsort(noise, axis=1)[:, :keep], axis=1)
    return jnp.take_along_axis(x_BND, kept[:, :, None], axis=1)
