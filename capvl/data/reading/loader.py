"""Batches from Examples. Order and augmentation are functions of (seed, index); the state is one integer.

Example n of a run (n counts over all hosts) is record `order[n]`, transformed with random
numbers of (seed, n). Batch k of size B holds the examples start + k B … start + (k + 1) B - 1 in
that order, and host h of H reads its H-th part. So a run resumed at any n, on any number of
hosts and with any batch size, sees exactly the examples that the uninterrupted run would.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from capvl.data.images.decode import BadImageError
from capvl.data.randomness import Uniforms, replacement
from capvl.data.reading import sources
from capvl.data.reading.batches import stack
from capvl.data.reading.mixing import MixedBatches
from capvl.data.reading.shots import few_shot
from capvl.data.reading.streams import ATTEMPTS, PREFIX, Stream
from capvl.data.reading.texts import FEATURES, of_regions, without_text
from capvl.errors import UserError
from capvl.terminal import say

MIN_SEEN = 200
CHECKED = 32
"""Records of a data set that are looked at for texts before a run begins."""


@dataclasses.dataclass(frozen=True)
class Host:
    """Which of how many hosts."""

    index: int = 0
    count: int = 1

    @classmethod
    def this(cls) -> "Host":
        """This process."""
        return cls(jax.process_index(), jax.process_count())

    def rows(self, batch: int) -> range:
        """Rows of a global batch that this host makes.

        Raises:
          UserError: the batch doesn't divide over the hosts.
        """
        if batch % self.count:
            near = max(1, round(batch / self.count)) * self.count
            raise UserError(
                f"batch_size={batch} doesn't divide over {self.count} hosts; the nearest that does is {near}."
            )
        each = batch // self.count
        return range(self.index * each, (self.index + 1) * each)


class Order:
    """Example number -> (which source, which record): a fresh permutation of each source every epoch."""

    def __init__(self, sizes: list[int], weights: list[float], seed: int):
        parts = [grain.MapDataset.range(size).seed(seed + i).shuffle().repeat() for i, size in enumerate(sizes)]
        self._alone = len(parts) == 1
        tagged = [part.map(functools.partial(_tag, i)) for i, part in enumerate(parts)]
        self._order = parts[0] if self._alone else grain.MapDataset.mix(tagged, weights=weights)

    def __getitem__(self, n: int) -> tuple[int, int]:
        return (0, int(self._order[n])) if self._alone else self._order[n]


def _tag(source: int, record: int) -> tuple[int, int]:
    return source, int(record)


@dataclasses.dataclass
class TrainBatch:
    """Makes batch k: picklable, so it runs in threads or worker processes."""

    sources: list[sources.Source]
    order: Order
    transform: Any
    seed: int
    start: int
    batch: int
    rows: range
    features: tuple[str, ...] = ()

    def __post_init__(self):
        # Whether a record with captions has all the texts that are asked for.
        self._text_suffices = not without_text({"text": ["a text"]}, self.features) and "text" in {
            feature.rstrip("?") for feature in self.features
        }
        self._empty_images = getattr(self.transform, "empty_images", False)

    def __call__(self, k: int) -> dict[str, np.ndarray]:
        """The rows of batch k that belong to this host, and `bad` (rows,): how many images were replaced."""
        first = self.start + int(k) * self.batch
        of_batch = getattr(self.transform, "for_batch", None)
        transform = of_batch(first // self.batch) if of_batch else self.transform
        return stack([self.example(first + row, transform) for row in self.rows])

    def example(self, n: int, transform=None) -> dict[str, Any]:
        """Example n by its batch's transform; one with a bad image, or without what is asked for, is replaced
        by one drawn from (seed, n), ATTEMPTS times."""
        which, record = self.order[n]
        return self.of_record(n, self.sources[which], record, transform or self.transform)

    def of_record(self, n: int, source, record: int, transform) -> dict[str, Any]:
        """Example n, of a record."""
        for attempt in range(ATTEMPTS):
            try:
                return transform(self._read(source, record), Uniforms(self.seed, n)) | {"bad": np.int32(attempt)}
            except BadImageError as e:
                last = e
                record = replacement(self.seed, n, attempt, len(source))
        raise UserError(f"{ATTEMPTS} examples in a row of data set {source.name!r} are bad; the last: {last}")

    def _read(self, source, record: int) -> dict[str, Any]:
        """A record without blanks among its captions."""
        example = source[record]
        texts = example.get("text")
        # Nearly all records are whole, and this is asked of each.
        if self._text_suffices and isinstance(texts, list) and texts and all([text.strip() for text in texts]):
            return example
        if without_text(example, self.features) and not self._empty_images:
            raise BadImageError(f"record {record} has no text")
        if isinstance(texts, list) and not all(text.strip() for text in texts):
            example["text"] = [text for text in texts if text.strip()]
        return example


def check_texts(source: sources.Source, features: tuple[str, ...]) -> None:
    """Raises UserError where no record of a data set, of CHECKED evenly spread ones, has a text that is needed."""
    texts, called = tuple(f for f in features if f.rstrip("?") in FEATURES.values()), of_regions(features)
    chosen = range(0, len(source), -(-len(source) // CHECKED))
    if texts and all(without_text(source.read(i, texts + called), features) for i in chosen):
        raise UserError(
            f"Data set {source.name!r} has no text in any of {len(chosen)} records, and the objective learns from "
            f"{' or '.join([text.rstrip('?') for text in texts] + ['regions with names'] * bool(called))}."
        )


class PreparedPart:
    """A prepared data set of a mixture with streams, in the order that it has alone."""

    def __init__(self, source, transform, features: tuple[str, ...], *, seed: int, order_seed: int):
        """seed: of the augmentation."""
        self._source, self._order = source, Order([len(source)], [1.0], order_seed)
        self._make = TrainBatch([source], self._order, transform, seed, 0, 1, range(1), features)

    def __len__(self) -> int:
        return len(self._source)

    def example(self, n: int, number: int, transform) -> dict[str, Any]:
        """Example n of the mixture, which is number so and so of this part."""
        return self._make.of_record(n, self._source, self._order[number][1], transform)


class TrainLoader:
    """Endless training batches of this host; `position` is the number of the next example over all hosts."""

    def __init__(self, options, transform, features, *, batch: int, seed: int, position=0, host=None, examples=0):
        """Opens the sources.

        Args:
          options: `config.data` (`capvl.data.options.DataOptions`).
          transform: the objective's, training form.
          features: keys that an Example must have.
          batch: global batch size.
          seed: of order and augmentation.
          position: example to begin with; a checkpoint's.
          host: this host, by default.
          examples: of the whole run, for the line that says epochs; 0 where there is no end.

        Raises:
          UserError: see `capvl.data.reading.sources.open_source`, or no text where the objective needs one.
        """
        self.options, self.batch, self.position = options, batch, position
        rows = (host or Host.this()).rows(batch)
        self.seen = self.bad = 0
        features, weights = tuple(features), [weight for _, weight in options.parts()]
        opened = self._open(transform, features, seed)
        self._streams = [source for source in opened if isinstance(source, Stream)]
        if self._streams:
            parts = [
                source
                if isinstance(source, Stream)
                else PreparedPart(source, transform, features, seed=seed, order_seed=seed + i)
                for i, source in enumerate(opened)
            ]
            given = dict(seed=seed, batch=batch, position=position, rows=rows)
            self._batches = iter(MixedBatches(parts, weights, transform, options, **given))
        else:
            order = Order([len(s) for s in opened], weights, seed)
            make = TrainBatch(opened, order, transform, seed, position, batch, rows, features)
            self._batches = _prefetched(make, options)
        if len(opened) > 1 or self._streams:
            self._say_shares(opened, weights, examples)

    def records(self) -> str:
        """Numbers of records that the order depends on, of each part."""
        return repr([[stream.name, stream.order.size, stream.index.digest()] for stream in self._streams])

    def _open(self, transform, features: tuple[str, ...], seed: int) -> list:
        """The sources of the parts."""
        options, opened = self.options, []
        alone = sum(name.startswith(PREFIX) for name, _ in options.parts()) == 1
        given = dict(features=features, fields=options.fields())
        empty_images = getattr(transform, "empty_images", False)
        for i, (name, _) in enumerate(options.parts()):
            if name.startswith(PREFIX):
                pattern = name.removeprefix(PREFIX)
                how = dict(seed=seed + i, empty_images=empty_images, alone=alone)
                opened.append(Stream(pattern, options, features, **how))
                opened[-1].check()
                continue
            source = sources.open_source(name, options.split, options.directory(), **given)
            check_texts(source, features)
            opened.append(few_shot(source, options.shots, options.shots_seed) if options.shots else source)
        return opened

    def _say_shares(self, opened: list, weights: list[float], examples: int) -> None:
        """One line for each part: its share, and its epochs over the run."""
        for source, weight in zip(opened, weights, strict=True):
            share = weight / sum(weights)
            epochs = f", {share * examples / len(source):,.2f} epochs" if examples else ""
            say(f"Data: {share:.1%} of the examples from {source.name} ({len(source):,} records{epochs}).")
            if isinstance(source, Stream) and self.options.window > len(source):
                say(
                    f"data.window={self.options.window:,} is more than an epoch of {source.name}: each is shuffled in "
                    f"{source.order.lanes} blocks."
                )

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
          UserError: more than `max_bad` of the images seen so far are bad.
        """
        batch = next(self._batches)
        bad = batch.pop("bad")
        self.position += self.batch
        self.seen += len(bad)
        self.bad += int(bad.sum())
        if self.seen >= MIN_SEEN and self.bad > self.options.max_bad * self.seen:
            worst = "; ".join(words for stream in self._streams if (words := stream.worst()))
            raise UserError(
                f"{self.bad} of {self.seen} examples are bad, or without a text or label, more than data.max_bad="
                f"{self.options.max_bad}; check data set {self.options.name!r}"
                + (f", most of all {worst}." if worst else ".")
            )
        return batch


class KindsLoader:
    """Endless {kind: batch} of several kinds of batch side by side; `position` is in examples of `config.batch_size`.

    Each kind has an order and random numbers of its own, functions of (seed, index) as those of one are.
    """

    def __init__(self, loaders: dict[str, TrainLoader], *, batch: int, position: int = 0):
        """batch: `config.batch_size`; position: as a checkpoint has it."""
        self.loaders, self.batch, self.position = loaders, batch, position

    @property
    def bad(self) -> int:
        """Examples that were replaced."""
        return sum(loader.bad for loader in self.loaders.values())

    def records(self) -> str:
        """See `TrainLoader.records`."""
        return "".join(loader.records() for loader in self.loaders.values())

    def __iter__(self) -> Iterator[dict[str, dict[str, np.ndarray]]]:
        return self

    def __next__(self) -> dict[str, dict[str, np.ndarray]]:
        """The next batch of each kind; see `TrainLoader.__next__`."""
        batches = {kind: next(loader) for kind, loader in self.loaders.items()}
        self.position += self.batch
        return batches


def _prefetched(make, options) -> Iterator[dict[str, np.ndarray]]:
    """Batches 0, 1, 2 … made ahead in threads, or in worker processes."""
    dataset = grain.MapDataset.range(2**62).map(make)
    if options.workers:
        parse_flags()
        each = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        options_mp = grain.MultiprocessingOptions(num_workers=options.workers, per_worker_buffer_size=options.prefetch)
        return iter(dataset.to_iter_dataset(each).mp_prefetch(options_mp))
    read = grain.ReadOptions(num_threads=options.threads, prefetch_buffer_size=max(options.prefetch, options.threads))
    return iter(dataset.to_iter_dataset(read))


def parse_flags() -> None:
    """Worker processes read absl's flags."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["capvl"])


def to_device(batch: dict[str, np.ndarray], sharding) -> dict[str, jax.Array]:
    """This host's rows -> global device arrays: the one transfer that a training step makes."""
    with jax.transfer_guard_host_to_device("allow"):
        if jax.process_count() == 1:
            return jax.device_put(batch, sharding)
        return jax.tree.map(lambda v: jax.make_array_from_process_local_data(sharding, v), batch)
