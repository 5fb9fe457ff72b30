"""Data sets by name: what is read of them, and one clear sentence where they can't be.

An Example is a dict with some of these keys:
  image   encoded bytes (JPEG, PNG, WebP …)
  text    list of captions, str or UTF-8 bytes
  label   int
  images  the encoded images of an example that has several
and, as they stand in the data set, any other feature that was asked for (objects, questions …).
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from capvl import storage
from capvl.data.reading import annotations
from capvl.data.reading.decoders import Decoder, Fields
from capvl.data.scenes import making
from capvl.errors import UserError, nearest

FIELDS = {
    "scenes": Fields(text="text", label="label"),
    "image_text": Fields(text="text", label="label"),
    "coco_captions": Fields(text="captions/text"),
    "laion400m": Fields(text="caption"),
    "wit": Fields(text="caption_reference_description"),
    "wit_kaggle": Fields(text="caption_reference_description"),
    "ref_coco": Fields(text="objects/refexp/raw"),
    "imagenet2012": Fields(label="label"),
    "imagenet_v2": Fields(label="label"),
    "imagenet2012_real": Fields(label="real_label"),
    "oxford_iiit_pet": Fields(label="label"),
    "oxford_flowers102": Fields(label="label"),
    "cifar10": Fields(label="label"),
    "cifar100": Fields(label="label"),
    "caltech101": Fields(label="label"),
    "cars196": Fields(label="label"),
    "caltech_birds2011": Fields(label="label"),
    "food101": Fields(label="label"),
    "stanford_dogs": Fields(label="label"),
    "sun397": Fields(label="label"),
    "dtd": Fields(label="label"),
    "places365_small": Fields(label="label"),
    "mnist": Fields(label="label"),
}
NAMED_BY = ("image_id?", "key?")
_TEXT_NAMES = ("text", "captions", "caption")


def default_data_dir() -> str:
    """$TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.join(os.path.expanduser("~"), "tensorflow_datasets")


class Source:
    """A prepared split, read at random: `source[i]` is an Example with the features asked for.

    Pickles as its arguments, so worker processes open their own files.
    """

    def __init__(self, directory: str, split: str, fields: Fields, features: tuple[str, ...], name: str):
        self._arguments = (directory, split, fields, features, name)
        self._readers: dict[tuple[str, ...], Source] = {}
        self.name = name
        builder = _builder(directory)
        self.info, self._builder = builder.info, builder
        self._decoder = Decoder(builder.info.features, fields, features, name)
        self._data = _open_split(builder, split, name)

    def __reduce__(self):
        return (Source, self._arguments)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = storage.retry(self._data.__getitem__, index, what=f"Reading data set {self.name!r}")
        return self._decoder(record)

    def read(self, index: int, features: tuple[str, ...]) -> dict[str, Any]:
        """Only some features of an Example, which need not be among those asked for."""
        if features not in self._readers:
            directory, split, fields, _, name = self._arguments
            self._readers[features] = Source(directory, split, fields, features, name)
        return self._readers[features][index]

    def annotations(
        self, features: tuple[str, ...], indices: Sequence[int] | np.ndarray | None = None, *, likely: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Examples without images, in order: only some features, which need not be among those asked for.

        They come from a file beside the data, which is made the first time that more than a few of a split's records
        are asked for (`capvl.data.reading.annotations`); "height?" and "width?" come from there also where the data
        set has no such features: 0 where they are unknown.

        Args:
          features: as of `open_source`; no image is among them.
          indices: of the Examples; None for all.
          likely: the reader stops after about so many; 0: after all.
        """
        indices = range(len(self)) if indices is None else indices
        directory, _, fields, _, name = self._arguments
        decode = Decoder(self.info.features, fields, features, name)
        parts = self._annotated(min(likely or len(indices), len(indices)), decode.features)
        if parts is None:
            yield from (self.read(int(i), features) for i in indices)
            return
        sized = [k for k in ("height", "width") if f"{k}?" in features and k not in decode.features]
        yield from annotations.examples(parts, indices, decode, fields.image, sized)

    def _annotated(self, count: int, features: set[str]):
        """`capvl.data.reading.annotations.of_split`, where so many records' features are asked for."""
        builder, split, name = self._builder, self._arguments[1], self.name
        if any(annotations.is_large(self.info.features[key]) for key in features):
            return None

        def open_(whole: str):
            return _open_split(builder, whole, name)

        return annotations.of_split(builder, split, count, name, default_data_dir(), open_)

    def identity(self) -> tuple[Any, Any]:
        """(which Examples these are, what their files are now), as plain values."""
        directory, split, fields, features, _ = self._arguments
        return [directory, split, dataclasses.asdict(fields), features], annotations.files_of(self._builder, split)

    def labels(self) -> np.ndarray:
        """Labels (N,) of all Examples, which have one."""
        path = self._arguments[2].label or "label"
        parts = self._annotated(len(self), {path}) if path in self.info.features else None
        if parts and all(path in own.columns for own, _ in parts):
            return np.concatenate([own.columns[path][numbers.start : numbers.stop] for own, numbers in parts])
        return np.array([example["label"] for example in self.annotations(("label",))], np.int64)

    def label_names(self) -> list[str] | None:
        """Names of the classes, where the data set has them."""
        if self._arguments[2].names:
            return list(self._arguments[2].names)
        return self._decoder.label_names()


def name_of(source: Source, index: int) -> str:
    """What a record is called: its `image_id`, else its `key`, else its number."""
    return name_in(source.read(int(index), NAMED_BY), int(index))


def names(source: Source, count: int = 0) -> list[str]:
    """What the first so many records are called (`name_of`); 0 for all."""
    records = source.annotations(NAMED_BY, range(min(count or len(source), len(source))))
    return [name_in(record, i) for i, record in enumerate(records)]


def name_in(record: dict[str, Any], index: int) -> str:
    """The name of a record that was read with NAMED_BY."""
    return as_text(record.get("image_id", "") or record.get("key", "") or index)


def as_text(value: Any) -> str:
    """Text as records hold it, bytes or str; bytes that are not UTF-8 are replaced."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class Subset:
    """Some records of a source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.name, self._source, self._indices = source.name, source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]

    def read(self, index: int, features: tuple[str, ...]) -> dict[str, Any]:
        """See `Source.read`."""
        return self._source.read(int(self._indices[index]), features)

    def identity(self) -> tuple[Any, Any]:
        """See `Source.identity`."""
        about, files = self._source.identity()
        return [about, np.asarray(self._indices).tolist()], files

    def annotations(self, features: tuple[str, ...], indices=None, *, likely: int = 0) -> Iterator[dict[str, Any]]:
        """See `Source.annotations`."""
        chosen = self._indices if indices is None else self._indices[np.asarray(indices, int)]
        return self._source.annotations(features, chosen, likely=likely)

    def label_names(self):
        """See `Source.label_names`."""
        return self._source.label_names()


def labels(name: str, split: str, data_dir: str) -> np.ndarray:
    """Labels of all examples of a data set, in order.

    Raises:
      UserError: see `open_source`.
    """
    return open_source(name, split, data_dir, features=("label",)).labels()


def _open_split(builder, split: str, name: str):
    # tfds is slow to import.
    from tensorflow_datasets.core.file_adapters import FileFormat

    examples = _examples(builder, split, name)
    if not builder.info.available_file_formats() & FileFormat.with_random_access():
        raise UserError(
            f"Data set {name!r} is not in ArrayRecord files; prepare it again with "
            f"`python -m capvl.data.prepare tfds --name={name}`."
        )
    try:
        if not examples:
            raise UserError(f"Split {split!r} of data set {name!r} is empty.")
        return builder.as_data_source(split=split).data_source
    except (ValueError, OSError) as e:
        raise UserError(f"Split {split!r} of data set {name!r} can't be read: {e}") from e


def _examples(builder, split: str, name: str) -> int:
    """How many examples a split has.

    Raises:
      UserError: it hasn't that split.
    """
    known = list(builder.info.splits)
    for bare in _names(split):
        if bare not in known:
            raise UserError(f"Data set {name!r} has no split {split!r}." + nearest(bare, known))
    try:
        return builder.info.splits[split].num_examples
    except Exception as e:  # tfds reads the text with a parser of its own.
        raise UserError(f"Split {split!r} of data set {name!r} can't be read: {storage.reason(e)}") from e


def _names(split: str) -> list[str]:
    """Of the splits that a tfds split such as "train[:90%]+val" is made of."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def guess_fields(name: str, features) -> Fields:
    """The table's entry where the data set has its features, else one guessed from the features' names."""
    base = name.split("/", maxsplit=1)[0].split(":", maxsplit=1)[0]
    known = FIELDS.get(base)
    # People also prepare their own files under such a name.
    if known and all(path.split("/")[0] in features for path in (known.image, known.text, known.label) if path):
        return known
    text = next((t for t in _TEXT_NAMES if t in features), "")
    return Fields(text=text, label="label" if "label" in features else "")


def open_source(
    name: str,
    split: str,
    data_dir: str = "",
    *,
    features: tuple[str, ...] = ("image", "text"),
    fields: Fields | None = None,
) -> Source:
    """Opens a prepared data set.

    Args:
      name: "scenes/64" (made on first use), a tfds name, the name given to `capvl.data.prepare
        tars`, or a folder that holds a prepared data set.
      split: a tfds split, such as "train" or "train[:90%]".
      data_dir: where prepared data sets are; default `default_data_dir()`.
      features: keys that the Examples shall have; "KEY?" only where the data set has it.
      fields: which feature is what, where the table doesn't know the data set.

    Raises:
      UserError: unknown, not prepared, empty, or without the features asked for.
    """
    directory = find(name, data_dir or default_data_dir())
    if fields is None or not (fields.text or fields.image != "image"):
        names = fields.names if fields else ()
        fields = guess_fields(name, _builder(directory).info.features)
        fields = dataclasses.replace(fields, names=names)
    return Source(directory, split, fields, features, name)


def _builder(directory: str):
    """tfds' builder of a prepared folder, which imports the classes that features.json names: only tfds' own.

    Raises:
      UserError: it names others, or tfds can't read the folder.
    """
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    file = storage.folder(directory) / "features.json"
    try:
        foreign = sorted(n for n in _classes(storage.read_json(file)) if not _TFDS_CLASS.fullmatch(n))
    except RecursionError as e:
        raise UserError(f"{str(file)!r} is nested too deeply for the features of a data set.") from e
    if foreign:
        raise UserError(f"{str(file)!r} names code to import, {foreign[0]!r}, which is not of tensorflow_datasets.")
    try:
        return tfds.builder_from_directory(directory)
    except Exception as e:  # tfds, protobuf and json raise many kinds.
        raise UserError(f"{directory!r} can't be read as a data set: {type(e).__name__}: {storage.reason(e)}") from e


_TFDS_CLASS = re.compile(r"tensorflow_datasets(\.[A-Za-z_]\w*)+")


def _classes(value: Any) -> Iterator[str]:
    """Names of the feature classes anywhere in features.json, in its present and its old spelling."""
    if isinstance(value, list):
        for item in value:
            yield from _classes(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("pythonClassName", "python_class_name", "type") and isinstance(item, str):
                yield item
            else:
                yield from _classes(item)
    elif isinstance(value, str):  # JSON within JSON, which tfds reads in more than one place.
        with contextlib.suppress(ValueError):
            yield from _classes(json.loads(value))


def find(name: str, data_dir: str) -> str:
    """The folder of a prepared data set; embedded ones are made if need be.

    Raises:
      UserError: it is unknown or not prepared.
    """
    if os.path.isfile(os.path.join(name, "dataset_info.json")):
        return name
    bare = name.partition(":")[0]
    base = bare.split("/")[0]
    if base == "scenes":
        return making.scenes(bare.partition("/")[2] or "64", data_dir)
    folder = pathlib.Path(data_dir, *bare.split("/"))
    versions = sorted(folder.glob("*/dataset_info.json")) or sorted(folder.glob("*/*/dataset_info.json"))
    wanted = name.partition(":")[2]
    versions = [v for v in versions if not wanted or v.parent.name == wanted]
    if versions:
        return str(versions[-1].parent)
    if base in FIELDS:
        raise UserError(
            f"Data set {name!r} is not prepared in {data_dir!r}; prepare it with "
            f"`python -m capvl.data.prepare tfds --name={name} --data_dir={data_dir}`."
        )
    prepared = [p.name for p in pathlib.Path(data_dir).glob("*") if any(p.glob("**/dataset_info.json"))]
    raise UserError(
        f"Data set {name!r} is neither known nor prepared in {data_dir!r}; tar shards are prepared with "
        f"`python -m capvl.data.prepare tars --name={base} --train='…/*.tar' --data_dir={data_dir}`, "
        f"images with boxes as `… prepare regions --help` tells." + nearest(name, {*prepared, *FIELDS})
    )


def decoder(directory: str, features: tuple[str, ...], fields: Fields | None = None) -> Decoder:
    """What makes Examples of the records of a prepared folder, which may be in a bucket.

    Raises:
      UserError: it is none, or hasn't these features.
    """
    known = _builder(directory).info.features
    fields = fields or guess_fields(pathlib.PurePath(directory).parent.name, known)
    return Decoder(known, fields, features, directory)


def contents(directory: str, split: str) -> tuple[int, list[str]]:
    """Number of examples of a split of a prepared folder, and paths of all shards that it is taken from.

    Raises:
      UserError: it hasn't that split.
    """
    builder = _builder(directory)
    examples, splits = _examples(builder, split, directory), builder.info.splits
    return examples, sorted({str(path) for name in _names(split) for path in splits[name].filepaths})


def splits(name: str, data_dir: str = "") -> list[str]:
    """Names of a prepared data set's splits.

    Raises:
      UserError: it is unknown or not prepared.
    """
    return list(_builder(find(name, data_dir or default_data_dir())).info.splits)
