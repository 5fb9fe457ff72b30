"""What a prepared split says of its images, in one file beside it, without the images.

A record holds its image too and can only be read as a whole: to learn ImageNet's 1.28 million labels from the records
is to read 140 GB. So all records are read once, in parallel and without decoding a pixel; what is kept of each is the
record itself without images (and other large arrays), its image's size, and its whole numbers as columns. The file
knows size and time of the files that it was made of, and is made again where these have changed. Where it can't be
kept, it stays in memory.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from capvl import storage
from capvl.data.images.decode import BadImageError, image_size
from capvl.errors import UserError

VERSION = 1
RECORDS = 256
"""Records that are read at a time."""
THREADS = 16
FEW = 0.05
"""Of so small a part of a split's records it isn't worth while to read all of them for what they say."""
LARGE = 64
"""Values of an array above which it isn't kept."""
_READ: dict[tuple[str, str], "Annotations"] = {}
_NONE = np.iinfo(np.int64).min
"""Where a record has no such number."""
_MOST = 8
"""Splits whose annotations stay in memory."""


@dataclasses.dataclass(frozen=True)
class Annotations:
    """Of all records of a split, in order.

    Attributes:
      about: the feature (`image`) whose sizes are known, and size and time of the split's `files`.
      records: uint8, serialized tf.train.Examples of the kept features, one behind the other.
      ends: (N,) int64, where each ends.
      sizes: (N, 2) int32, height and width of the upright image; 0 where it can't be told.
      columns: feature -> (N,) int64.
    """

    about: dict[str, Any]
    records: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    columns: dict[str, np.ndarray]

    def record(self, index: int) -> bytes:
        """One record without its image."""
        return self.records[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes()


def read_annotations(builder, split: str, name: str, home: str, open_: Callable[[], Any] | None) -> Annotations | None:
    """The annotations of a whole split, such as "train".

    Args:
      builder: tfds' of the data set.
      split: its name.
      name: of the data set, for messages.
      home: folder of this user's data sets, where the file is kept when it can't be beside the data.
      open_: opens the split's records; None where nothing shall be made that isn't there.
    """
    files = stamps(builder, split)
    folder = str(builder.data_dir)
    key, places = (folder, split), _places(folder, home, split)
    known = _READ.get(key)
    if known is None or known.about["files"] != files:
        known = _load(places, files, builder.info.splits[split].num_examples, name)
    if known is None and open_ is not None:
        known = _make(open_(), builder.info.features, files, f"{name} {split!r}")
        _keep(places, known, name)
    if known is not None:
        _READ[key] = known
        while len(_READ) > _MOST:
            del _READ[next(iter(_READ))]
    return known


def is_large(feature) -> bool:
    """Whether a feature of a data set is, or has, images or other large arrays."""
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image | tfds.features.Audio | tfds.features.Video):
        return True
    if isinstance(feature, tfds.features.FeaturesDict):
        return any(is_large(own) for own in feature.values())
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return is_large(inner)
    shape = feature.shape
    return len(shape) > 1 or any(side is not None and side > LARGE for side in shape)


def _say(text: str) -> None:
    # It imports JAX, which is slow, and --help doesn't wait for it.
    from capvl.terminal import say

    say(text)


def _places(folder: str, home: str, split: str) -> list[epath.Path]:
    """Where the file may be."""
    name = f"{split}.annotations.npz"
    digest = hashlib.blake2b(folder.encode(), digest_size=8).hexdigest()
    return [storage.folder(folder) / name, storage.folder(home) / ".annotations" / digest / name]


def stamps(builder, split: str) -> dict[str, list[int]]:
    """Name -> [bytes, time] of each file of a split."""

    def stamp(path) -> list[int]:
        if storage.in_bucket(path):
            found = epath.Path(path).stat()
            return [found.length, int(found.mtime or 0)]
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]

    paths = builder.info.splits[split].filepaths
    try:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            stamps = pool.map(lambda path: storage.retry(stamp, path, what=f"Reading {str(path)!r}"), paths)
            return {path.name: own for path, own in zip(paths, stamps, strict=True)}
    except OSError as e:
        raise UserError(f"A file of split {split!r} can't be read: {storage.reason(e)}: {e.filename!r}.") from e


def _load(places: list[epath.Path], files: dict, count: int, name: str) -> Annotations | None:
    """The annotations that were kept of these files; None where there are none."""
    for place in places:
        try:
            with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                columns = {column: arrays[f"column/{column}"] for column in about["columns"]}
                found = Annotations(about, arrays["records"], arrays["ends"], arrays["sizes"], columns)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            _say(f"{str(place)!r} is not whole; it is made again.")
            continue
        if about.get("version") != VERSION or about.get("files") != files or not _fits(found, count):
            _say(f"{str(place)!r} is of other files than data set {name!r} has now; it is made again.")
            continue
        return found
    return None


def _fits(found: Annotations, count: int) -> bool:
    shapes = [found.ends.shape == (count,), found.sizes.shape == (count, 2)]
    shapes += [column.shape == (count,) for column in found.columns.values()]
    ends = np.concatenate([[0], found.ends])
    return all(shapes) and ends[-1] == len(found.records) and bool((np.diff(ends) >= 0).all())


def _make(data, features, files: dict, what: str) -> Annotations:
    """Reads all records of a split."""
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    kept = sorted(key for key in features if not is_large(features[key]))
    plain = (tfds.features.ClassLabel, tfds.features.Scalar, tfds.features.Tensor)
    whole = [k for k in kept if type(features[k]) in plain and features[k].shape == ()]
    whole = [key for key in whole if np.dtype(features[key].np_dtype).kind in "iu"]
    images = [key for key in sorted(features) if isinstance(features[key], tfds.features.Image)]
    image = "image" if "image" in images else next(iter(images), "")
    # It imports JAX, which is slow, and --help doesn't wait for it.
    from capvl.terminal import progress

    strip = _Strip(data, frozenset(kept), image, whole)
    _say(f"Reading what {what} says of its {len(data)} images, once.")
    parts = [range(first, min(first + RECORDS, len(data))) for first in range(0, len(data), RECORDS)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = list(progress(pool.map(strip, parts), len(parts), f"records of {what}"))
    records, lengths, sizes, columns = (np.concatenate(column) for column in zip(*found, strict=True))
    by_name = {key: columns[:, i] for i, key in enumerate(whole) if (columns[:, i] != _NONE).all()}
    about = {"version": VERSION, "files": files, "image": image, "columns": list(by_name)}
    return Annotations(about, records, np.cumsum(lengths, dtype=np.int64), sizes, by_name)


@dataclasses.dataclass(frozen=True)
class _Strip:
    """Numbers of records -> (their bytes without large features, lengths (n,), sizes (n, 2), whole numbers (n, c))."""

    data: Any
    kept: frozenset[str]
    image: str
    whole: list[str]

    def __call__(self, numbers: range) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        # tfds is slow to import.
        from tensorflow_datasets.proto import tf_example_pb2

        read = storage.retry(self.data.__getitems__, numbers, what="Reading records")
        sizes, columns = np.zeros((len(read), 2), np.int32), np.zeros((len(read), len(self.whole)), np.int64)
        stripped = []
        for i, record in enumerate(read):
            example = tf_example_pb2.Example.FromString(record)
            features = example.features.feature
            if self.image in features:
                sizes[i] = _size(features[self.image].bytes_list.value)
            for key in [key for key in features if key.split("/")[0] not in self.kept]:
                del features[key]
            columns[i] = [next(iter(features[key].int64_list.value), _NONE) for key in self.whole]
            stripped.append(example.SerializeToString(deterministic=True))
        lengths = np.array([len(record) for record in stripped], np.int64)
        return np.frombuffer(b"".join(stripped), np.uint8), lengths, sizes, columns


def _size(values) -> tuple[int, int]:
    try:
        return image_size(values[0]) if len(values) else (0, 0)
    except BadImageError:
        return 0, 0


def _keep(places: list[epath.Path], made: Annotations, name: str) -> None:
    """Writes annotations to the first place that takes them; says so where none does."""
    file = io.BytesIO()
    columns = {f"column/{column}": values for column, values in made.columns.items()}
    arrays = {"records": made.records, "ends": made.ends, "sizes": made.sizes} | columns
    np.savez(file, about=np.array(json.dumps(made.about)), **arrays)
    for place in places:
        try:
            storage.make_folder(place.parent)
            storage.replace_bytes(place, file.getvalue())
            return
        except UserError as e:
            reason = e
    _say(f"What data set {name!r} says of its images can't be kept and will be read again next time: {reason}")


def of_split(
    builder, split: str, count: int, name: str, home: str, open_: Callable[[str], Any]
) -> list[tuple[Annotations, range]] | None:
    """Of each part of a split such as "train[90%:]+val", in order: the annotations of "train", and the numbers of its
    records there. None where there are none, and only FEW records are asked for.

    Args:
      builder: tfds' of the data set.
      split: of the parts.
      count: so many of its records are asked for.
      name, home: see `read_annotations`.
      open_: opens the records of a whole split.
    """
    parts = list(positions(builder, split))
    wholes = dict.fromkeys(whole for whole, _ in parts)
    makes = count > FEW * sum(builder.info.splits[whole].num_examples for whole in wholes)
    for whole in wholes:
        opens = functools.partial(open_, whole) if makes else None
        wholes[whole] = read_annotations(builder, whole, name, home, opens)
    return None if None in wholes.values() else [(wholes[whole], numbers) for whole, numbers in parts]


def examples(
    parts: list[tuple[Annotations, range]], indices: Iterable[int], decode, image: str, sized: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Examples without images.

    Args:
      parts: see `of_split`.
      indices: of the Examples.
      decode: makes an Example of a record (`capvl.data.reading.decoders.Decoder`).
      image: the feature that is the image.
      sized: of "height" and "width", what is added of it.
    """
    ends = np.cumsum([len(numbers) for _, numbers in parts])
    for i in map(int, indices):
        part = int(np.searchsorted(ends, i, side="right"))
        own, numbers = parts[part]
        place = numbers[i - int(ends[part])]
        size = own.sizes[place] if own.about["image"] == image else np.zeros(2, int)
        named = dict(zip(("height", "width"), size.tolist(), strict=True))
        yield decode(own.record(place)) | {key: named[key] for key in sized}


def files_of(builder, split: str) -> dict[str, dict[str, list[int]]]:
    """Whole split -> name of each of its files -> [bytes, time]."""
    return {whole: stamps(builder, whole) for whole in sorted({whole for whole, _ in positions(builder, split)})}


def positions(builder, split: str) -> Iterator[tuple[str, range]]:
    """(whole split, numbers of its records) of the parts of a split such as "train[90%:]+val", in order."""
    starts = {}
    for whole, info in builder.info.splits.items():
        first = 0
        for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
            starts[str(path)] = whole, first
            first += length
    for part in builder.info.splits[split].file_instructions:
        whole, first = starts[str(part.filename)]
        yield whole, range(first + part.skip, first + part.skip + part.take)
