"""The one exception that a user sees, and spelling help for what they typed."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can mend, in one sentence. The commands print it and exit with code 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known word closest to `word`, else the list of known words."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(sorted(known))}." if known else ""
