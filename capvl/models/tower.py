"""GLIP's tower between feature pyramid and heads (arXiv 2112.03857, §3.2, eq. 4-6).

A block: fusion of maps and text, a BERT layer on the text, a DyHead block on the maps. GLIP-T (A) has only the last.
"""

from collections.abc import Sequence

import jax
from flax import nnx

from capvl.errors import UserError, nearest
from capvl.models.bert import layer_keys, split_key
from capvl.models.deep_fusion import KINDS, DeepFusion, FusionToImage, TowerBertLayer
from capvl.models.dyhead import DyHeadBlock
from capvl.models.sizes import Size
from capvl.nn.stack import scan_outputs, stack


class TowerBlock(nnx.Module):
    """One block; arguments as of `DetectionTower`."""

    def __init__(
        self,
        width: int,
        text: Size,
        rngs: nnx.Rngs,
        *,
        levels: int,
        fusion: str,
        fusion_width: int,
        fusion_heads: int,
        gate: float,
        dropout: float,
        **dyhead,
    ):
        self.fusion = self.text = nnx.data(None)
        if fusion != "none":
            sizes = width, text.width, fusion_width, fusion_heads
            kind = FusionToImage if fusion == "to_image" else DeepFusion
            more = dict(separate=levels) if fusion == "separate" else {}
            self.fusion = kind(*sizes, gate=gate, dropout=dropout, rngs=rngs, **more)
            self.text = TowerBertLayer(text, dropout=dropout, rngs=rngs)
        self.dyhead = DyHeadBlock(width, rngs=rngs, **dyhead)

    def __call__(self, maps, states_BLD, mask_BL, key: jax.Array | None = None):
        """As of `DetectionTower`."""
        if self.fusion is not None:
            keys = split_key(key, 2)
            maps, states_BLD = self.fusion(maps, states_BLD, mask_BL, keys[0])
            states_BLD = self.text(states_BLD, mask=mask_BL[:, None, None], key=keys[1])
        return self.dyhead(maps), states_BLD


class DetectionTower(nnx.Module):
    """Maps and text states, made one another's by several blocks of equal shapes.

    Args:
      width: of the maps.
      text: width, MLP width and heads of the text's states and of the BERT layers.
      blocks: how many; GLIP-T has 6, GLIP-L 8.
      levels: number of maps.
      fusion: "both": X-MHA of all levels at once; "separate": of each level by itself; "to_image": the text changes the
        maps alone; "none": neither fusion nor BERT layers, the states leave as they came.
      fusion_width, fusion_heads: of the fusion's attention.
      dropout: in training, of attention weights of fusions and BERT layers, and of what the latter add.
      remat: what the backward pass recomputes of a block, a key of `capvl.nn.stack.REMAT`.
      unroll: blocks as straight-line code instead of a loop.
      dyhead: arguments of `DyHeadBlock`: groups, offsets, deform.

    Raises:
      UserError: an unknown fusion, or a fusion width that isn't a multiple of the heads.
    """

    def __init__(
        self,
        width: int,
        text: Size,
        blocks: int,
        *,
        levels: int = 5,
        fusion: str = "both",
        fusion_width: int = 2048,
        fusion_heads: int = 8,
        dropout: float = 0.1,
        remat: str = "none",
        unroll: bool = False,
        rngs: nnx.Rngs,
        **dyhead,
    ):
        if fusion not in KINDS:
            raise UserError(f"Unknown fusion {fusion!r}." + nearest(fusion, KINDS))
        if fusion_width % fusion_heads:
            raise UserError(f"A fusion of width {fusion_width} doesn't divide among {fusion_heads} heads.")
        self.depth, self.remat, self.unroll = blocks, remat, unroll
        kind = dict(fusion=fusion, fusion_width=fusion_width, fusion_heads=fusion_heads, dropout=dropout)
        kind |= dict(levels=levels, gate=1 / blocks, **dyhead)
        self.blocks = stack(lambda r: TowerBlock(width, text, r, **kind), blocks, rngs)

    def __call__(
        self, maps: Sequence[jax.Array], states_BLD, mask_BL, key: jax.Array | None = None
    ) -> tuple[list[jax.Array], jax.Array]:
        """Runs the blocks.

        Args:
          maps: (B, Y, X, C) of each level, finest first.
          states_BLD: text states, of the maps' dtype.
          mask_BL: which of them are tokens, bool.
          key: means training.

        Returns:
          Maps and states of the same shapes.
        """

        def body(block, carry, key):
            return block(*carry, mask_BL, key), None

        keys, carry = layer_keys(key, self.depth), (list(maps), states_BLD)
        return scan_outputs(self.blocks, body, carry, keys, remat=self.remat, unroll=self.unroll)[0]
