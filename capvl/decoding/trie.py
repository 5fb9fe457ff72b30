"""A tree of token sequences that share their beginnings, and their likelihoods given images.

Every distinct beginning is read by the decoder once: the tree's inner nodes form one sequence in
which a node attends to its ancestors only. A node's distribution over the vocabulary is normalised
once, for all its children. Sums of the same log-probabilities as scoring each sequence by itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from capvl.nn.padding import lengths

# Logits that are held at a time, over all images and nodes.
LOGITS = 1 << 25


@dataclasses.dataclass(frozen=True)
class TokenTree:
    """Sequences of tokens as a tree; every array is padded to a stated size.

    Attributes:
      inputs: (M,) token that each inner node reads: 0, the start, for the root.
      depths: (M,) its text position.
      visible: (M, M) whether row's node may see column's: an ancestor or itself.
      parents: (E,) for each edge the inner node that it begins at.
      tokens: (E,) and the token that it stands for.
      paths: (C, L) edges of each sequence; E where it is over.
      nodes, edges: how many of M and E are not padding.
    """

    inputs: np.ndarray
    depths: np.ndarray
    visible: np.ndarray
    parents: np.ndarray
    tokens: np.ndarray
    paths: np.ndarray
    nodes: int
    edges: int


def build(sequences: np.ndarray, nodes: int = 0, edges: int = 0, count: int = 0) -> TokenTree:
    """The tree of token sequences (C, L), 0 being padding behind each.

    Args:
      sequences: int tokens.
      nodes, edges, count: sizes M, E and C to pad to; 0 for what is needed.
    """
    prefixes: dict[tuple, int] = {(): 0}
    edge_of: dict[tuple, int] = {}
    edge_parents, edge_tokens, paths = [], [], []
    for row in sequences:
        length = int(lengths(row))
        path = []
        for i in range(length):
            key = tuple(int(t) for t in row[: i + 1])
            if key not in edge_of:
                parent = prefixes.setdefault(key[:-1], len(prefixes))
                edge_of[key] = len(edge_tokens)
                edge_parents.append(parent)
                edge_tokens.append(key[-1])
            path.append(edge_of[key])
        paths.append(path)
    inner = sorted(prefixes, key=prefixes.get)
    size, wide = max(nodes, len(inner)), max(edges, len(edge_tokens))
    inputs, depths = np.zeros(size, np.int32), np.zeros(size, np.int32)
    visible = np.eye(size, dtype=bool)
    for i, prefix in enumerate(inner):
        inputs[i], depths[i] = (prefix[-1] if prefix else 0), len(prefix)
        if prefix:
            visible[i] |= visible[prefixes[prefix[:-1]]]
    table = np.full((max(count, len(paths)), sequences.shape[1]), wide, np.int32)
    for i, path in enumerate(paths):
        table[i, : len(path)] = path

    def padded(values):
        return np.pad(np.array(values, np.int32), (0, wide - len(values)))

    return TokenTree(
        inputs, depths, visible, padded(edge_parents), padded(edge_tokens), table, len(inner), len(edge_tokens)
    )


def split(sequences: np.ndarray, most: int) -> tuple[list[TokenTree], np.ndarray]:
    """Trees of equal sizes over all sequences, and the order in which they hold them.

    Neighbours in the order of their tokens share most, so they come to the same tree.

    Args:
      sequences: (C, L) tokens.
      most: inner nodes of a tree; a single sequence may have more.
    """
    order = np.lexsort(sequences.T[::-1])
    groups, group, known = [], [], set()
    for index in order:
        row = sequences[index]
        own = {tuple(row[:i]) for i in range(int(lengths(row)))}
        if group and len(known | own) > most:
            groups.append(group)
            group, known = [], set()
        group.append(index)
        known |= own
    groups.append(group)
    trees = [build(sequences[g]) for g in groups]
    sizes = [max(len(t.inputs) for t in trees), max(len(t.tokens) for t in trees), max(len(t.paths) for t in trees)]
    return [build(sequences[g], *sizes) for g in groups], np.concatenate([np.array(g) for g in groups])


def log_likelihoods(model, image_kv, tree: TokenTree | dict) -> jax.Array:
    """log p(sequence | image) in nats: (B, C) float32, 0 for padded sequences.

    Args:
      model: one with a captioner's `decoder` and `dtype`.
      image_kv: `model.decoder.image_kv(encoded)` of B images.
      tree: a `TokenTree`, or its arrays by name.
    """
    t = {k: jnp.asarray(v) for k, v in (tree if isinstance(tree, dict) else arrays(tree)).items()}
    decoder, batch = model.decoder, image_kv[0].shape[1]
    inputs_M = jnp.where(t["depths"] == 0, decoder.start, t["inputs"])
    inputs_BM = jnp.broadcast_to(inputs_M[None], (batch, len(inputs_M)))
    hidden_BMD = decoder(inputs_BM, image_kv, mask=t["visible"][None, None], places_L=t["depths"], dtype=model.dtype)
    total_BM = _log_totals(decoder, hidden_BMD)
    kernel_DV, bias_V = decoder.output_layer()
    bias_V = bias_V.astype(jnp.float32)
    columns_DE = kernel_DV.astype(hidden_BMD.dtype)[:, t["tokens"]]
    hidden_BED = hidden_BMD[:, t["parents"]]
    logits_BE = jnp.einsum("bed,de->be", hidden_BED, columns_DE, preferred_element_type=jnp.float32)
    logp_BE = logits_BE + bias_V[t["tokens"]][None] - total_BM[:, t["parents"]]
    padded = jnp.pad(logp_BE, ((0, 0), (0, 1)))
    return padded[:, t["paths"]].sum(axis=-1)


def _log_totals(decoder, hidden_BMD) -> jax.Array:
    """log of the sum of exp(logits) of every node, (B, M) float32, a few nodes at a time."""
    batch, nodes, _ = hidden_BMD.shape

    def of_node(hidden_BD):
        return jax.nn.logsumexp(decoder.project(hidden_BD[:, None])[:, 0], axis=-1)

    at_once = max(1, min(nodes, LOGITS // (batch * decoder.vocab)))
    return jax.lax.map(of_node, jnp.swapaxes(hidden_BMD, 0, 1), batch_size=at_once).T


def arrays(tree: TokenTree) -> dict[str, np.ndarray]:
    """The tree's arrays by name."""
    return {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if f.name not in ("nodes", "edges")}
