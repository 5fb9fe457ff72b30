"""Samples that are left out, counted by reason."""

NAMED_PER_REASON = 5


class RejectedError(Exception):
    """A sample that is left out, with its key where that is known; the message is the reason."""

    def __init__(self, reason: str, key: str = ""):
        super().__init__(reason)
        self.key = key


class Rejected(dict):
    """reason -> [count, the first names]."""

    def count(self, reason: str, name: str) -> None:
        """One more."""
        entry = self.setdefault(reason, [0, []])
        entry[0] += 1
        if len(entry[1]) < NAMED_PER_REASON:
            entry[1].append(name)

    def add(self, other: dict) -> None:
        """All of another shard, which comes after this one."""
        for reason, (count, names) in other.items():
            entry = self.setdefault(reason, [0, []])
            entry[0] += count
            entry[1] = (entry[1] + names)[:NAMED_PER_REASON]
