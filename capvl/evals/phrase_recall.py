"""How many phrases have their box among the first k found: recall at k (Flickr30k Entities, arXiv 1505.04870).

Protocols are MDETR's (2104.12763): any of a phrase's boxes suffices, or the one around all of them is asked for.
"""

from collections.abc import Sequence

import numpy as np

from capvl.evals.boxes import RIGHT, ious

RANKS = (1, 5, 10, 0)
"""Boxes that are looked at; 0 for all."""


def merged(boxes: np.ndarray) -> np.ndarray:
    """The box around boxes (T, 4): (1, 4)."""
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])[None]


def place(found: np.ndarray, right: np.ndarray) -> int:
    """Of boxes (D, 4), best first, the number of the first that has an IoU of at least 0.5 with one of the right ones
    (T, 4); both (x0, y0, x1, y1). -1 where none has."""
    hits = (ious(found[:, None], right[None]) >= RIGHT).any(axis=1)
    return int(hits.argmax()) if hits.any() else -1


def recalls(places: Sequence[int], kinds: Sequence[Sequence[str]] = ()) -> dict[str, float]:
    """`R@1`, `R@5`, `R@10` and `R@all` of all phrases, and KIND/R@1 and so on of each kind of
    phrase.

    Args:
      places: of each phrase, of `place`.
      kinds: of each phrase, such as ("people",); a phrase may have several, or none. () where nothing is known.

    Raises:
      ValueError: there is no phrase.
    """
    if not len(places):
        raise ValueError("no phrases")
    place_N = np.asarray(places)
    groups: dict[str, list[int]] = {"": list(range(len(place_N)))}
    for number, own in enumerate(kinds):
        for kind in dict.fromkeys(own):
            groups.setdefault(kind, []).append(number)
    values = {}
    for kind, rows in groups.items():
        own = place_N[rows]
        for rank in RANKS:
            name = f"R@{rank or 'all'}"
            values[f"{kind}/{name}" if kind else name] = float(((own >= 0) & ((own < rank) | (rank == 0))).mean())
    return values
