"""A `FusionBert` that writes: a causal language model of texts that look at an image (captions of X-VLM, arXiv
2111.08276, section 4.2), or at the states of a question (its answers; arXiv 2107.07651, section 5).

It has no parameters beside the BERT's: the layers and the table that told hidden words tell the next one.

Letters beside those of `capvl.models.fusion`: N image tokens, or positions of a question; R rows, a multiple of B.
"""

import jax
import jax.numpy as jnp

from capvl.models import flops
from capvl.models.bert import BertBlock, layer_keys, split_key
from capvl.models.fusion import FusionBert
from capvl.models.git_decoder import ImageKeys
from capvl.models.sizes import Size
from capvl.models.text_decoder import shift_right, vocabulary_logits
from capvl.nn.layers import drop
from capvl.nn.stack import scan, scan_outputs
from capvl.parallel.rules import constrain


class FusionDecoder:
    """What captioning, scoring and search ask of any decoder (`capvl.models.text_decoder.TextDecoder`), of a BERT.

    Attributes:
      bert: with its head for words.
      start: id that is read before a text ([CLS]).
      vocab: number of token ids.
    """

    def __init__(self, bert: FusionBert, start: int):
        self.bert, self.start, self.vocab = bert, start, bert.tokens.shape[0]

    def image_kv(self, encoded_BNC, valid_BN=None, *, key=None) -> ImageKeys:
        """Keys and values of every layer that looks at something.

        Args:
          encoded_BNC: what is looked at.
          valid_BN: which of it is seen; None for all.
          key: of the dropout in training, of which there is none here.
        """
        del key
        valid_BN = jnp.ones(encoded_BNC.shape[:2], bool) if valid_BN is None else valid_BN
        dense = self.bert.cross.cross_kv
        _, kv = scan_outputs(dense, lambda dense, x, _: (x, dense(x)), encoded_BNC, unroll=self.bert.unroll)
        return ImageKeys(kv[:, :, :, 0], kv[:, :, :, 1], valid_BN[None])

    def embed(self, tokens_BL, places_L=None) -> jax.Array:
        """LN of token plus position plus segment 0, (B, L, D)."""
        bert = self.bert
        places_L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32) if places_L is None else places_L
        positions = bert.positions[...][bert.first_position + places_L] + bert.types[...][:1]
        return bert.norm((bert.tokens[...][tokens_BL] + positions[None]).astype(bert.dtype))

    def __call__(
        self, inputs_BL, image_kv: ImageKeys, *, mask=None, causal=False, places_L=None, dtype=jnp.float32, key=None
    ) -> jax.Array:
        """Hidden states (B, L, D) that the output layer reads.

        Args:
          inputs_BL: int32 ids that the decoder reads.
          image_kv: what `image_kv` returned, for B images, or fewer: consecutive rows then share one.
          mask: boolean among the text, broadcastable to (B, H, L, L); None for all.
          causal: whether position l sees positions 0..l only.
          places_L: the text position of each input, where it isn't 0, 1, 2, …
          dtype: of the states.
          key: of the dropout, in training.
        """
        bert, keys = self.bert, split_key(key, 3)
        x = drop(self.embed(inputs_BL, places_L).astype(dtype), bert.dropout, keys[0])
        x = constrain(x, "batch", None, None)
        run = dict(remat=bert.remat, unroll=bert.unroll)
        if bert.depth:

            def plain(block, x, key):
                return block(x, mask=mask, causal=causal, key=key)

            x = scan(bert.blocks, plain, x, layer_keys(keys[1], bert.depth), **run)
        image_mask = image_kv.mask(len(inputs_BL))

        def crossed(block, x, xs):
            k, v, key = xs
            keys = split_key(key, 3)
            x = block.attended(x, mask=mask, causal=causal, key=keys[0])
            x = block.crossed(x, k, v, image_mask=image_mask, key=keys[1])
            return block.after_attention(x, keys[2])

        xs = (*image_kv[:2], layer_keys(keys[2], bert.cross_layers))
        return bert.word_states(scan(bert.cross, crossed, x, xs, **run))

    def causal(self, labels_BL, image_kv: ImageKeys, *, dtype=jnp.float32, key=None) -> jax.Array:
        """Hidden states (B, L, D) that predict `labels_BL` from the image and the tokens before."""
        return self(shift_right(labels_BL, self.start), image_kv, causal=True, dtype=dtype, key=key)

    def output_layer(self) -> tuple[jax.Array, jax.Array]:
        """Kernel (D, V), the token table's transpose, and bias (V,)."""
        return self.bert.output_layer()

    def project(self, hidden_BLD) -> jax.Array:
        """Logits (B, L, V) in float32."""
        return vocabulary_logits(hidden_BLD, *self.output_layer())

    def init_cache(self, batch: int, length: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
        """Empty caches of the text: two zero arrays (layers, batch, length, H, K)."""
        heads, width = self.bert.cross.cross_kv.kernel.shape[-2:]
        shape = (self.bert.depth + self.bert.cross_layers, batch, length, heads, width)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def step(self, token_R, image_kv: ImageKeys, cache, index, *, dtype=jnp.float32):
        """Logits (R, V) after reading one token at position `index`, and the updated cache; R is a multiple of B."""
        bert, lower = self.bert, self.bert.depth
        x = self.embed(token_R[:, None], jnp.asarray(index)[None]).astype(dtype)
        image_mask = image_kv.mask(len(token_R))

        def attended(block: BertBlock, x, block_cache):
            added, block_cache = block.attn.step(x, block_cache, index)
            return block.norm1(x + added), block_cache

        def plain(block, x, block_cache):
            x, block_cache = attended(block, x, block_cache)
            return block.after_attention(x), block_cache

        def crossed(block, x, xs):
            k, v, block_cache = xs
            x, block_cache = attended(block, x, block_cache)
            return block.after_attention(block.crossed(x, k, v, image_mask=image_mask)), block_cache

        caches = [tuple(c[lower:] for c in cache)]
        if lower:
            x, of_lower = scan_outputs(bert.blocks, plain, x, tuple(c[:lower] for c in cache))
            caches.insert(0, of_lower)
        x, caches[-1] = scan_outputs(bert.cross, crossed, x, (*image_kv[:2], caches[-1]))
        logits_RV = self.project(bert.word_states(x))[:, 0]
        return logits_RV, tuple(jnp.concatenate(c) for c in zip(*caches, strict=True))


def text_flops(size: Size, lower: int, vocab: int, length: int, image_tokens: int) -> float:
    """Forward matmul FLOPs of one text behind keys and values that are there, output layer included.

    size: of all layers, of which the first `lower` look at nothing.
    """
    crossing = (size.depth - lower) * flops.cross_attention(length, image_tokens, size.width)
    words = flops.dense(length, size.width, size.width) + flops.dense(length, size.width, vocab)
    return size.depth * flops.layer(length, size) + crossing + words


def image_kv_flops(size: Size, layers: int, image_tokens: int, image_width: int) -> float:
    """Forward matmul FLOPs of the keys and values of one image in so many layers."""
    return layers * 2 * flops.dense(image_tokens, image_width, size.width)
