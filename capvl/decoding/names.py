"""A closed vocabulary of names: which tokens may follow which, for text that must be one of them.

The names' token sequences form a tree. A row stands at a node; it may go on with the tokens of the node's children,
and the end closes a name. Masks are made for a whole batch at once, so any search may be constrained.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from capvl.errors import UserError
from capvl.nn.padding import real


@dataclasses.dataclass(frozen=True)
class Names:
    """The tree; `of` builds it.

    Attributes:
      tokens: (nodes, W) int32: tokens of each node's children; 0 behind them.
      nodes: (nodes, W) int32: the children's own numbers; node 0 is the root.
      longest: tokens of the longest name, the end included.
    """

    tokens: np.ndarray
    nodes: np.ndarray
    longest: int

    @classmethod
    def of(cls, names: Sequence[str], tokenizer) -> "Names":
        """The tree of some texts.

        Raises:
          UserError: there is no name, one is empty, or two are the same to the tokenizer.
        """
        if not names:
            raise UserError("The vocabulary of names is empty.")
        sequences: dict[tuple[int, ...], str] = {}
        for name in names:
            ids = np.asarray(tokenizer(name, 4096))
            sequence = tuple(int(i) for i in ids[real(ids)])
            if 0 in sequence:
                raise UserError(f"The name {name!r} has the piece of id 0 in it, which a model never writes.")
            if len(sequence) < 2:
                raise UserError(f"The name {name!r} has no token; names must have a word in them.")
            if sequence in sequences:
                raise UserError(f"The names {sequences[sequence]!r} and {name!r} are the same to the tokenizer.")
            sequences[sequence] = name
        return cls.of_tokens(list(sequences))

    @classmethod
    def of_tokens(cls, sequences: Sequence[Sequence[int]]) -> "Names":
        """The tree of token sequences, each of which ends with the end's id."""
        children: list[dict[int, int]] = [{}]
        for sequence in sequences:
            node = 0
            for token in sequence:
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                node = children[node][token]
        width = max(1, *map(len, children))
        tokens, nodes = np.zeros((2, len(children), width), np.int32)
        for i, row in enumerate(children):
            tokens[i, : len(row)], nodes[i, : len(row)] = list(row), list(row.values())
        return cls(tokens, nodes, max(map(len, sequences)))

    def begin(self, rows: int) -> jax.Array:
        """Where rows stand before anything is written: (1, rows), as a cache has it."""
        return jnp.zeros((1, rows), jnp.int32)

    def advance(self, node_R, token_R) -> jax.Array:
        """Where rows stand after a token; the root where it is no child's."""
        is_child = (jnp.asarray(self.tokens)[node_R] == token_R[:, None]) & (token_R != 0)[:, None]
        return jnp.where(is_child, jnp.asarray(self.nodes)[node_R], 0).max(axis=1)

    def mask(self, node_R, vocab: int) -> jax.Array:
        """Which tokens may come next: (R, V) bool."""
        rows = jnp.arange(len(node_R))[:, None]
        allowed = jnp.zeros((len(node_R), vocab), bool).at[rows, jnp.asarray(self.tokens)[node_R]].set(True)
        return allowed.at[:, 0].set(False)
