"""What a preparation of many shards makes, here or on Apache Beam, and by what two records count as the same."""

import dataclasses

from etils import epath

from capvl.data.preparing import shards
from capvl.data.preparing.filters import Filters
from capvl.data.reading.samples import NO_NAMES, Names

Job = tuple[str, int]  # Split, and number of the shard in it.


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be made.

    Attributes:
      name: of the data set.
      sources: (split, number) -> source file.
      folder: of the finished data set.
      parts: folder of what is unfinished.
      filters: what is let in.
      frames: of each clip; 0 for images.
      names: of what holds the image and the captions.
    """

    name: str
    sources: dict[Job, str]
    folder: epath.Path
    parts: epath.Path
    filters: Filters
    frames: int = 0
    names: Names = NO_NAMES

    def part(self, job: Job) -> str:
        """Path of a shard's records."""
        return str(self.parts / f"{job[0]}-{job[1]:05d}")

    def splits(self) -> list[str]:
        """In the order in which they were given."""
        return list(dict.fromkeys(split for split, _ in self.sources))


def identities(split: str, row: shards.Row) -> list[tuple[str, str, str]]:
    """(split, kind, value) of everything by which a record may be the same as another; the first kind is the reason.

    Keys are unique within a file only: another file may have the same ones for other samples, as img2dataset's have.
    """
    return [(split, "key", f"{row.key} {row.content}"), *((split, kind, value) for kind, value in row.hashes.items())]
