"""Sources that can't be read at random: tar (WebDataset), parquet and TFRecord shards, local or on a bucket; and the
ArrayRecord files of prepared data sets, in order, where they lie in one.

The files are dealt to R readers, each of which shuffles its own through a window, without end.
Example n of a run comes from reader n mod R; a batch is laid out reader by reader, so host h
opens only its own readers' files and any number of hosts that divides R gives the same batches.
To resume, records are read again but not decoded.

What can't be used is left out before it gets a number, so it is passed at the same place by every
run that reads the same files; images that turn out to be bad are replaced by records that come soon.
"""

import collections
import concurrent.futures
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath
from google.protobuf.message import DecodeError

from capvl import storage
from capvl.data.images.decode import BadImageError, image_size
from capvl.data.randomness import Uniforms, replacement
from capvl.data.reading import records, sources
from capvl.data.reading.batches import stack
from capvl.data.reading.patterns import expand
from capvl.data.reading.rejected import RejectedError
from capvl.data.reading.samples import Count, Names, is_parquet, is_tar, samples
from capvl.data.reading.texts import without_text
from capvl.errors import UserError

ATTEMPTS = 10
AHEAD = 256
"""Records from which replacements are drawn, where the window is so large."""
CHECKED = 1000
TOLD = 5
MAX_BYTES = 64_000_000
"""Of one member of a tar."""


class LeftOut(NamedTuple):
    """A sample or a whole file that can't be used."""

    reason: str
    name: str


def tar_samples(path: str) -> Iterator[dict[str, bytes]]:
    """Samples {suffix: bytes} of a WebDataset tar, in order; members of a sample are neighbours.

    Raises:
      UserError: the file is missing or not a tar.
    """

    def fail(reason: str, name: str) -> None:
        if name == path:
            raise UserError(f"Shard {path!r} can't be read: {reason}.")

    yield from (members for _, members in samples(path, MAX_BYTES, fail))


def shard_examples(path: str, names: Names, count: Count) -> Iterator[dict]:
    """Examples with `image`, `text`, `label`, `class_name`, `boxes` and `phrases` of a tar or parquet file.

    Args:
      path: of the file.
      names: of what holds the image and the captions.
      count: told (reason, name) of what is left out.
    """
    for key, members in samples(path, MAX_BYTES, count, names):
        try:
            image, record = records.image(members, names.image), records.read(members, names.text)
            boxes = records.boxes(record.schema, image_size(image)) if record.schema.boxes else []
        except BadImageError:
            boxes = []  # Who decodes the image replaces it.
        except RejectedError as e:
            count(str(e), key)
            continue
        yield {
            "key": key,
            "image": image,
            "text": [caption.encode() for caption in record.captions],
            "label": record.schema.label,
            "class_name": record.schema.class_name,
            "boxes": _columns(boxes, ("bbox", "chain", "label", "category")),
            "phrases": _columns(records.phrases(record.schema), _PHRASE),
        }


_PHRASE = ("phrase", "chain", "sentence", "first_word", "num_words")


def _columns(rows: list[dict], names: tuple[str, ...]) -> dict[str, list]:
    """Rows as prepared records have them: a list of each name."""
    return {name: [row[name] for row in rows] for name in names}


def tfrecord_examples(path: str, image: str, text: str, count: Count | None = None) -> Iterator[dict]:
    """Examples of a TFRecord file of tf.train.Example protos, without TensorFlow.

    Args:
      path: of the file.
      image, text: names of the features; a record without them is left out.
      count: told (reason, name) of what is left out.

    Raises:
      UserError: the file can't be read, or the first record, and with it the file, has no such features.
    """
    # Slow to import.
    import grain
    from tensorflow_datasets.proto import tf_example_pb2

    usable, number = False, -1
    try:
        for record in grain.experimental.TFRecordIterDataset(path):
            number += 1
            features = tf_example_pb2.Example.FromString(record).features.feature
            missing = [name for name in (image, text) if not features[name].bytes_list.value]
            if missing and not usable:
                known = ", ".join(sorted(name for name in features if features[name].WhichOneof("kind")))
                raise UserError(f"Records of {path!r} have no feature {missing[0]!r}, but {known}.")
            usable = True
            if missing:
                if count:
                    count(f"no feature {missing[0]!r}", str(number))
                continue
            texts = [value for value in features[text].bytes_list.value if value.strip()]
            yield {"key": str(number), "image": features[image].bytes_list.value[0], "text": texts}
    # What is no TFRecord has a first record of absurd size.
    except (OSError, ValueError, MemoryError, OverflowError, DecodeError) as e:
        if storage.passes(e):
            raise
        said = (
            "is missing"
            if isinstance(e, FileNotFoundError)
            else f"is cut short or no TFRecord after {number + 1} records"
        )
        raise UserError(f"Shard {path!r} {said}.") from e


def array_record_examples(path: str, features: tuple[str, ...], fields: sources.Fields | None) -> Iterator[dict]:
    """Examples of one file of a prepared data set, in order.

    Args:
      path: of the file, beside its data set's features.json; in a bucket it is copied first.
      features: keys that the Examples shall have.
      fields: which feature is what, where its name doesn't say it.

    Raises:
      UserError: it can't be read, or hasn't these features.
    """
    # Slow to import.
    from array_record.python.array_record_module import ArrayRecordReader

    file = epath.Path(path)
    decode = sources.decoder(str(file.parent), (*features, "image_id?", "key?"), fields)
    try:
        with storage.local_copy(file) as local:
            reader = ArrayRecordReader(local)
            try:
                for number in range(reader.num_records()):
                    example = decode(reader.read([number])[0])
                    name = example.get("image_id") or example.get("key") or number
                    yield example | {"key": sources.as_text(name)}
            finally:
                reader.close()
    except (OSError, ValueError, RuntimeError, DecodeError) as e:
        if storage.passes(e):
            raise
        raise UserError(f"Shard {path!r} can't be read: {storage.reason(e)}.") from e


class Stream:
    """Batches from shards; see the module's text."""

    def __init__(self, pattern: str, options, transform, *, seed: int, host, features: tuple[str, ...] = ()):
        """Deals the files to the readers.

        Args:
          pattern: of the files.
          options: `config.data` (`capvl.data.options.DataOptions`).
          transform: the objective's, training form.
          seed: of order and augmentation.
          host: which of how many.
          features: that the objective asks for; samples without a text that it needs are left out.

        Raises:
          UserError: no files, or readers that don't fit the files or the hosts.
        """
        self.files = expand(pattern)
        self.options, self.transform, self.seed, self.host = options, transform, seed, host
        self.pattern, self.features = pattern, features
        self._told: dict[str, set[str]] = collections.defaultdict(set)
        if options.readers > len(self.files):
            raise UserError(f"data.readers={options.readers} is more than the {len(self.files)} files of {pattern!r}.")
        if options.readers % host.count:
            raise UserError(f"data.readers={options.readers} must be a multiple of the {host.count} hosts.")

    def check(self) -> None:
        """Raises UserError where none of the first samples of one of this host's readers can be used."""
        for reader in self._readers():
            self._check(self.files[reader :: self.options.readers])

    def _check(self, files: list[str]) -> None:
        reasons: collections.Counter[str] = collections.Counter()
        for item in (item for path in files for item in self._read(path)):
            if not isinstance(item, LeftOut):
                return
            reasons[item.reason] += 1
            if reasons.total() == CHECKED:
                break
        left_out = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common(TOLD)) or "there is none"
        which = repr(files[0]) + (f" and {len(files) - 1} more files" if len(files) > 1 else "")
        raise UserError(f"No sample of {which} can be used: {left_out}.")

    def _readers(self) -> range:
        """Of this host."""
        readers, host = self.options.readers, self.host
        return range(host.index * readers // host.count, (host.index + 1) * readers // host.count)

    def batches(self, batch: int, position: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches of this host from example `position` on.

        Raises:
          UserError: the batch or the position is not a multiple of the readers.
        """

        readers = self.options.readers
        if batch % readers or position % readers:
            raise UserError(
                f"batch_size={batch} and the position {position} must be multiples of data.readers={readers}."
            )
        own = self._readers()
        numbered = {r: _with_next(self._records(r, skip=position // readers), self._ahead()) for r in own}
        of_batch = getattr(self.transform, "for_batch", None)
        with concurrent.futures.ThreadPoolExecutor(self.options.threads) as pool:
            ahead = collections.deque()
            while True:
                while len(ahead) < max(self.options.prefetch, 1):
                    transform = of_batch(position // batch) if of_batch else self.transform
                    rows = []
                    for r in own:
                        for i in range(batch // readers):
                            n = position + i * readers + r
                            rows.append(pool.submit(self._example, transform, *next(numbered[r]), n))
                    ahead.append(rows)
                    position += batch
                yield stack([row.result() for row in ahead.popleft()])

    def _ahead(self) -> int:
        return max(ATTEMPTS, min(AHEAD, self.options.window))

    def _example(self, transform, record: tuple[dict, int], coming: tuple, n: int) -> dict:
        """Example n and, as `bad`, what was left out before it; a bad image is replaced by one of the records to come,
        drawn from (seed, n), ATTEMPTS times."""
        example, left_out = record
        for attempt in range(ATTEMPTS):
            try:
                return transform(example, Uniforms(self.seed, n)) | {"bad": np.int32(attempt + left_out)}
            except BadImageError as e:
                last = e
                example = coming[replacement(self.seed, n, attempt, len(coming))][0]
        raise UserError(f"{ATTEMPTS} examples in a row of {self.pattern!r} are bad; the last: {last}")

    def _records(self, reader: int, skip: int) -> Iterator[tuple[dict, int]]:
        """(record, how many were left out before it was read), from the reader's number `skip` on, window-shuffled,
        epoch after epoch."""
        files = self.files[reader :: self.options.readers]
        window: list[tuple[dict, int]] = []
        drawn = 0

        def draw():
            nonlocal drawn
            drawn += 1
            i = Uniforms(self.seed, drawn * self.options.readers + reader).below(len(window))
            window[i], window[-1] = window[-1], window[i]
            return window.pop()

        epoch = left_out = 0
        while True:
            order = sorted(range(len(files)), key=lambda i: Uniforms(self.seed + epoch, i * 7919 + reader)())
            read = 0
            for item in (item for i in order for item in self._read(files[i])):
                if isinstance(item, LeftOut):
                    self._tell(item)
                    left_out += 1
                    continue
                read += 1
                window.append((item, left_out))
                left_out = 0
                if len(window) >= self.options.window:
                    out = draw()
                    if drawn > skip:
                        yield out
            if not read:
                raise UserError(f"The {len(files)} files of reader {reader} hold no record, {files[0]!r} first.")
            while window:  # Every record once an epoch.
                out = draw()
                if drawn > skip:
                    yield out
            epoch += 1

    def _tell(self, item: LeftOut) -> None:
        """One line for the first of each reason."""
        told = self._told[item.reason]
        if item.name not in told and len(told) < TOLD:
            told.add(item.name)
            more = " (further ones are only counted)" if len(told) == TOLD else ""
            print(f"Left out of the stream: {item.name}: {item.reason}{more}", flush=True)

    def _read(self, path: str) -> Iterator[dict | LeftOut]:
        """Examples of a file, and what is left out of it where it stands."""
        return storage.resume(lambda: self._items(path), what=f"Reading shard {path!r}")

    def _items(self, path: str) -> Iterator[dict | LeftOut]:
        waiting: list[LeftOut] = []

        def count(reason: str, name: str) -> None:
            waiting.append(LeftOut(reason, path if name == path else f"{path}: {name}"))

        try:
            for example in self._examples(path, count):
                yield from waiting
                waiting.clear()
                if without_text(example, self.features) and not getattr(self.transform, "empty_images", False):
                    yield LeftOut("no text", f"{path}: {example['key']}")
                else:
                    yield example
        except UserError as e:  # Of this file; the others may be as they should.
            count(str(e).rstrip("."), path)
        yield from waiting

    def _examples(self, path: str, count: Count) -> Iterator[dict]:
        names = Names(self.options.image, self.options.text)
        if is_tar(path) or is_parquet(path):
            return shard_examples(path, names, count)
        if ".array_record" in pathlib.PurePath(path).name:
            fields = self.options.fields()
            asked = tuple(dict.fromkeys(("image", *self.features)))
            return array_record_examples(path, asked, fields if fields and (names.image or names.text) else None)
        return tfrecord_examples(path, names.image or "image", names.text or "text", count)


def _with_next(items: Iterator, count: int) -> Iterator[tuple]:
    """Each item of an endless iterator, with those that come next."""
    coming = collections.deque(next(items) for _ in range(count + 1))
    while True:
        first = coming.popleft()
        yield first, tuple(coming)
        coming.append(next(items))
