"""A closed vocabulary of names: which tokens may follow which, for text that must be one of them.

The names' token sequences form a tree. A row stands at a node; it may go on with the tokens of the node's children,
and the end closes a name. Masks are made for a whole batch at once, so any search may be constrained. Names that a row
may not write, because of their length or of what they repeat, are closed before it begins: it never comes to a node
from which there is no way on.

Letters: R rows, L positions, C names, W tokens of the longest, N nodes, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from capvl.errors import UserError
from capvl.nn.padding import lengths, real


@dataclasses.dataclass(frozen=True)
class Names:
    """The tree; `of` builds it.

    Attributes:
      tokens: (N, children) int32: tokens of each node's children; 0 behind them.
      nodes: (N, children) int32: the children's own numbers; node 0 is the root.
      sequences: (C, W) int32: the names' tokens, their ends included; 0 behind them.
      paths: (C, W) int32: the nodes that they lead to.
    """

    tokens: np.ndarray
    nodes: np.ndarray
    sequences: np.ndarray
    paths: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the longest name, the end included."""
        return self.sequences.shape[1]

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
        ids, paths = np.zeros((2, len(sequences), max(map(len, sequences))), np.int32)
        for row, sequence in enumerate(sequences):
            node = 0
            for place, token in enumerate(sequence):
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                node = children[node][token]
                ids[row, place], paths[row, place] = token, node
        width = max(1, *map(len, children))
        tokens, nodes = np.zeros((2, len(children), width), np.int32)
        for i, row in enumerate(children):
            tokens[i, : len(row)], nodes[i, : len(row)] = list(row), list(row.values())
        return cls(tokens, nodes, ids, paths)

    def check(self, room: int, *, cut: bool, **rules) -> None:
        """Raises UserError where no name may be written, or, unless `cut`, where one is longer than there is room for.

        Args:
          room: tokens that may be written behind the longest prompt.
          cut: whether longer names are to be left out.
          rules: of `writable`.
        """
        long = int((lengths(self.sequences) > room).sum())
        if long and not cut:
            raise UserError(
                f"{long} of {len(self.sequences)} names are longer (up to {self.longest} tokens, the end included) "
                f"than the {room} that there is room for; set max_tokens."
            )
        nothing = np.zeros((1, 1), np.int32)
        if not np.asarray(self.writable(nothing, np.array([room], np.int32), start=0, **rules)).any():
            raise UserError(
                f"None of the {len(self.sequences)} names may be written: all are too long (more than {room} tokens, "
                f"the end included), too short or repeat themselves."
            )

    def writable(self, prompt_RL, room_R, *, start: int, least: int, no_repeat: bool, ngram: int) -> jax.Array:
        """Which names each row may write: (R, C) bool.

        Args:
          prompt_RL: int32 tokens in front of the names, 0 behind them.
          room_R: tokens that may be written, the end included.
          start: token that is read before the first.
          least: tokens before the end that a name must have.
          no_repeat: whether a name must not have the same token twice in a row.
          ngram: how many tokens in a row must not be those that were in prompt or name before; 0 for any.
        """
        size_C = lengths(self.sequences)
        twice_CW = (self.sequences[:, 1:] == self.sequences[:, :-1]) & real(self.sequences)[:, 1:]
        allowed_C = (size_C > least) & ~(no_repeat & twice_CW.any(axis=1))
        allowed_RC = jnp.asarray(allowed_C)[None] & (jnp.asarray(size_C)[None] <= jnp.asarray(room_R)[:, None])
        if not ngram:
            return allowed_RC
        return allowed_RC & ~jax.lax.map(lambda row: self._repeats(row, start, ngram), jnp.asarray(prompt_RL))

    def _repeats(self, prompt_L, start: int, ngram: int) -> jax.Array:
        """Which names repeat `ngram` tokens behind a prompt: (C,) bool."""
        given = lengths(prompt_L) + 1
        before_T = jnp.pad(prompt_L, (1, self.longest), constant_values=(start, 0))
        places_T = jnp.arange(len(before_T))
        inside_T = jnp.clip(places_T - given, 0, self.longest - 1)
        text_CT = jnp.where((places_T >= given)[None], jnp.asarray(self.sequences)[:, inside_T], before_T[None])
        count = len(before_T) - ngram + 1
        if count < 2:
            return jnp.zeros(len(self.sequences), bool)
        same_CTT = jnp.asarray(np.tri(count, k=-1, dtype=bool))[None]  # Every window with those before it.
        for i in range(ngram):
            window_CT = text_CT[:, i : i + count]
            same_CTT = same_CTT & (window_CT[:, :, None] == window_CT[:, None])
        ends_T = places_T[ngram - 1 :]
        counts_CT = (ends_T >= given)[None] & (ends_T[None] < given + jnp.asarray(lengths(self.sequences))[:, None])
        return (same_CTT.any(axis=2) & counts_CT).any(axis=1)

    def open(self, writable_RC) -> jax.Array:
        """Which nodes some name that may be written leads through: (R, N) bool."""
        rows = jnp.arange(len(writable_RC))[:, None, None]
        counts_RN = jnp.zeros((len(writable_RC), len(self.tokens)), jnp.int32)
        return counts_RN.at[rows, jnp.asarray(self.paths)[None]].add(writable_RC[:, :, None].astype(jnp.int32)) > 0

    def begin(self, rows: int) -> jax.Array:
        """Where rows stand before anything is written: (1, rows), as a cache has it."""
        return jnp.zeros((1, rows), jnp.int32)

    def advance(self, node_R, token_R) -> jax.Array:
        """Where rows stand after a token; the root where it is no child's."""
        is_child = (jnp.asarray(self.tokens)[node_R] == token_R[:, None]) & (token_R != 0)[:, None]
        return jnp.where(is_child, jnp.asarray(self.nodes)[node_R], 0).max(axis=1)

    def mask(self, node_R, open_RN, vocab: int) -> jax.Array:
        """Which tokens may come next, through `open` nodes only: (R, V) bool."""
        rows = jnp.arange(len(node_R))[:, None]
        way_on = jnp.take_along_axis(open_RN, jnp.asarray(self.nodes)[node_R], axis=1)
        tokens = jnp.where(way_on, jnp.asarray(self.tokens)[node_R], 0)
        allowed = jnp.zeros((len(node_R), vocab), bool).at[rows, tokens].set(True)
        return allowed.at[:, 0].set(False)
