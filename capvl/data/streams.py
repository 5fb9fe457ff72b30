"""Sources that can't be read at random: tar (WebDataset) and TFRecord shards, local or on a bucket.

The files are dealt to R readers, each of which shuffles its own through a window, without end.
Example n of a run comes from reader n mod R; a batch is laid out reader by reader, so host h
opens only its own readers' files and any number of hosts that divides R gives the same batches.
To resume, records are read again but not decoded.
"""

import collections
import concurrent.futures
import glob
import re
import tarfile
from collections.abc import Iterator

import numpy as np
from etils import epath

from capvl import storage
from capvl.data.decode import BadImageError
from capvl.data.randomness import Uniforms
from capvl.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


def expand(pattern: str) -> list[str]:
    """Files of a pattern with * or {000..123}, in a folder or a bucket.

    Raises:
      UserError: there are none, or the bucket needs a package.
    """
    path = storage.folder(pattern)
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces:
        width = len(braces[1])
        numbers = range(int(braces[1]), int(braces[2]) + 1)
        files = [pattern[: braces.start()] + str(i).zfill(width) + pattern[braces.end() :] for i in numbers]
    else:
        files = sorted(map(str, path.parent.glob(path.name) if storage.in_bucket(path) else glob.glob(pattern)))
    if not files:
        raise UserError(f"No file matches {pattern!r}.")
    return files


def tar_samples(path: str) -> Iterator[dict[str, bytes]]:
    """Samples {suffix: bytes} of a WebDataset tar, in order; members of a sample are neighbours.

    Raises:
      UserError: the file is missing or not a tar.
    """
    try:
        with epath.Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            key, sample = None, {}
            for member in tar:
                if not member.isfile():
                    continue
                stem, _, suffix = member.name.partition(".")
                if stem != key and sample:
                    yield sample
                    sample = {}
                key = stem
                sample[suffix.lower()] = tar.extractfile(member).read()
            if sample:
                yield sample
    except (OSError, tarfile.TarError) as e:
        raise UserError(f"Shard {path!r} can't be read: {e}") from e


def tar_examples(path: str) -> Iterator[dict]:
    """Examples with `image` and `text` of a tar."""
    for sample in tar_samples(path):
        image = next((sample[s] for s in IMAGE_SUFFIXES if s in sample), b"")
        yield {"image": image, "text": [sample.get("txt", b"")]}


def tfrecord_examples(path: str, image: str, text: str) -> Iterator[dict]:
    """Examples of a TFRecord file of tf.train.Example protos, without TensorFlow."""
    import grain
    from tensorflow_datasets.proto import tf_example_pb2

    for record in grain.experimental.TFRecordIterDataset(path):
        features = tf_example_pb2.Example.FromString(record).features.feature
        for name in (image, text):
            if name not in features:
                raise UserError(f"Records of {path!r} have no feature {name!r}, but {', '.join(sorted(features))}.")
        yield {"image": features[image].bytes_list.value[0], "text": list(features[text].bytes_list.value)}


class Stream:
    """Batches from shards; see the module's text."""

    def __init__(self, pattern: str, options, transform, *, seed: int, host):
        """Deals the files to the readers.

        Raises:
          UserError: no files, or readers that don't fit the files or the hosts.
        """
        self.files = expand(pattern)
        self.options, self.transform, self.seed, self.host = options, transform, seed, host
        if options.readers > len(self.files):
            raise UserError(f"data.readers={options.readers} is more than the {len(self.files)} files of {pattern!r}.")
        if options.readers % host.count:
            raise UserError(f"data.readers={options.readers} must be a multiple of the {host.count} hosts.")

    def batches(self, batch: int, position: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches of this host from example `position` on.

        Raises:
          UserError: the batch or the position is not a multiple of the readers.
        """
        from capvl.data.loader import stack

        readers = self.options.readers
        if batch % readers or position % readers:
            raise UserError(
                f"batch_size={batch} and the position {position} must be multiples of data.readers={readers}."
            )
        own = range(self.host.index * readers // self.host.count, (self.host.index + 1) * readers // self.host.count)
        records = {r: self._records(r, skip=position // readers) for r in own}
        with concurrent.futures.ThreadPoolExecutor(self.options.threads) as pool:
            ahead = collections.deque()
            while True:
                while len(ahead) < max(self.options.prefetch, 1):
                    rows = []
                    for r in own:
                        for i in range(batch // readers):
                            n = position + i * readers + r
                            rows.append(pool.submit(self._example, next(records[r]), n))
                    ahead.append(rows)
                    position += batch
                yield stack([row.result() for row in ahead.popleft()])

    def _example(self, example: dict, n: int) -> dict:
        """Example n; a bad image is blanked and its text emptied, so it has no loss."""
        try:
            return self.transform(example, Uniforms(self.seed, n)) | {"bad": np.int32(0)}
        except BadImageError:
            blank = self.transform({"image": _GREY, "text": [b""]}, Uniforms(self.seed, n))
            return blank | {"text": np.zeros_like(blank["text"]), "bad": np.int32(1)}

    def _records(self, reader: int, skip: int) -> Iterator[dict]:
        """The reader's records from number `skip` on, window-shuffled, epoch after epoch."""
        files = self.files[reader :: self.options.readers]
        window: list[dict] = []
        drawn = 0

        def draw():
            nonlocal drawn
            drawn += 1
            i = Uniforms(self.seed, drawn * self.options.readers + reader).below(len(window))
            window[i], window[-1] = window[-1], window[i]
            return window.pop()

        epoch = 0
        while True:
            order = sorted(range(len(files)), key=lambda i: Uniforms(self.seed + epoch, i * 7919 + reader)())
            read = 0
            for i in order:
                for example in self._read(files[i]):
                    read += 1
                    window.append(example)
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

    def _read(self, path: str) -> Iterator[dict]:
        if path.endswith(".tar"):
            return storage.resume(lambda: tar_examples(path), what=f"Reading shard {path!r}")
        names = self.options.image or "image", self.options.text or "text"
        return storage.resume(lambda: tfrecord_examples(path, *names), what=f"Reading shard {path!r}")


def _grey() -> bytes:
    import cv2

    return cv2.imencode(".jpg", np.full((64, 64, 3), 128, np.uint8))[1].tobytes()


_GREY = _grey()
