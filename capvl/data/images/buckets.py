"""Buckets: the few sizes of images that batches come in. A program is compiled once for each.

All images of a batch are of one bucket, and batches go through the buckets in turn: which one a batch has depends on
its number alone, so it is the same on all hosts and after every restart, and examples keep their order. (With another
batch size the numbers are others: the same examples come, some of them in another size.)
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np


class Bucket(NamedTuple):
    """Size of the images of a batch in pixels, padding included."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


def square(side: int) -> Bucket:
    """A bucket of a side."""
    return Bucket(side, side)


def bucket_of(buckets: tuple[Bucket, ...], number: int) -> Bucket:
    """The bucket of batch `number` of a run: the number of its first example, divided by the batch size."""
    return buckets[number % len(buckets)]


def buckets_in(batch: Any) -> tuple[Bucket, ...]:
    """Sizes of the images in a batch, or in several kinds of one: of what is uint8 of shape (…, H, W, 3 or 4)."""
    shapes = [x.shape for x in jax.tree.leaves(batch) if x.dtype == np.uint8 and len(x.shape) >= 4]
    return tuple(Bucket(*shape[-3:-1]) for shape in shapes if shape[-1] in (3, 4))


@dataclasses.dataclass(frozen=True)
class Bucketed:
    """A training transform that makes the images of every batch for that batch's bucket.

    Attributes:
      transform: a dataclass with a field `crop` (`capvl.data.images.crops.Crop`).
      buckets: what batches go through.
    """

    transform: Any
    buckets: tuple[Bucket, ...]

    @property
    def tokenizer(self) -> Any:
        """The texts' tokenizer, where the transform has one."""
        return self.transform.tokenizer

    @property
    def empty_images(self) -> bool:
        """Whether the transform learns from images of which nothing is said."""
        return getattr(self.transform, "empty_images", False)

    def for_batch(self, number: int) -> Any:
        """The transform of batch `number` of the run."""
        crop = self.transform.crop.in_bucket(bucket_of(self.buckets, number))
        return dataclasses.replace(self.transform, crop=crop)

    def __call__(self, example: dict, uniforms) -> dict[str, np.ndarray]:
        """An example as the transform itself has it."""
        return self.transform(example, uniforms)
