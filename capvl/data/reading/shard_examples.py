"""Records of files that streams read -> Examples, the same as those of prepared data sets."""

import functools
from typing import Any

from etils import epath
from google.protobuf.message import DecodeError

from capvl.data.images.decode import BadImageError, image_size
from capvl.data.reading import records, samples, shard_files, sources, tars
from capvl.data.reading.ranges import ChangedError
from capvl.data.reading.rejected import RejectedError
from capvl.data.reading.samples import Names
from capvl.data.reading.shard_files import Shard
from capvl.errors import UserError

_PHRASE = ("phrase", "chain", "sentence", "first_word", "num_words")


class Examples:
    """Makes Examples of records of files."""

    def __init__(self, names: Names, features: tuple[str, ...], fields: sources.Fields | None):
        """What is asked for.

        Args:
          names: of what holds the image and the captions.
          features: keys that Examples of prepared data sets shall have.
          fields: which feature of those is what, where its name doesn't say it.
        """
        self.names = names
        asked = tuple(dict.fromkeys(("image", *features, "image_id?", "key?")))
        # One of a data set is enough: its files lie in one folder.
        self._decoder = functools.cache(lambda folder: sources.decoder(folder, asked, fields))

    def __call__(self, shard: Shard, number: int, raw: Any) -> dict[str, Any]:
        """The Example of a record, with its `key`.

        Args:
          shard: the file.
          number: of the record in it.
          raw: what `shard_files.read` gave.

        Raises:
          RejectedError: it can't be used, with the reason.
          ChangedError: it is no record: the file is no longer what it was.
        """
        try:
            if shard.kind == shard_files.TFRECORD:
                return self._of_tfrecord(number, raw)
            if shard.kind == shard_files.ARRAY_RECORD:
                return self._of_array_record(shard, number, raw)
            key, members = _sample(shard, number, raw)
            try:
                return of_sample(key, members, self.names)
            except RejectedError as e:
                raise RejectedError(str(e), key) from e
        except DecodeError as e:
            raise RejectedError("no tf.train.Example") from e
        except UserError as e:  # Of this file; the others may be as they should.
            raise RejectedError(str(e).rstrip(".")) from e

    def _of_tfrecord(self, number: int, raw: bytes) -> dict[str, Any]:
        # Slow to import.
        from tensorflow_datasets.proto import tf_example_pb2

        features = tf_example_pb2.Example.FromString(shard_files.tfrecord_data(raw)).features.feature
        image, text = self.names.image or "image", self.names.text or "text"
        missing = [name for name in (image, text) if not features[name].bytes_list.value]
        if missing:
            known = ", ".join(sorted(name for name in features if features[name].WhichOneof("kind")))
            raise RejectedError(f"no feature {missing[0]!r}, but {known or 'none'}")
        texts = [value for value in features[text].bytes_list.value if value.strip()]
        return {"key": str(number), "image": features[image].bytes_list.value[0], "text": texts}

    def _of_array_record(self, shard: Shard, number: int, raw: bytes) -> dict[str, Any]:
        example = self._decoder(str(epath.Path(shard.path).parent))(raw)
        return example | {"key": sources.as_text(example.get("image_id") or example.get("key") or number)}


def _sample(shard: Shard, number: int, raw: Any) -> tuple[str, dict[str, bytes]]:
    """(key, suffix -> bytes) of a record of a tar or parquet file."""
    if isinstance(raw, RejectedError):
        raise raw
    if isinstance(raw, samples.ParquetRow):
        key, members, bad = raw.sample(number)
        if bad:
            raise RejectedError(bad, key)
        return key, members
    if shard.kind == shard_files.COMPRESSED:
        return raw
    said: list[str] = []
    sample = tars.sample(raw, lambda reason, name: said.append(reason))
    if sample is None:
        if tars.TOO_LARGE in said:
            raise RejectedError(tars.TOO_LARGE)
        raise ChangedError(f"record {number} doesn't begin where it should")
    return sample


def of_sample(key: str, members: dict[str, bytes], names: Names) -> dict[str, Any]:
    """The Example of a sample of a tar or parquet file: `image`, `text`, `label`, `class_name`, `boxes`, `phrases`.

    Raises:
      RejectedError: it can't be used, with the reason.
    """
    image, record = records.image(members, names.image), records.read(members, names.text)
    try:
        boxes = records.boxes(record.schema, image_size(image)) if record.schema.boxes else []
    except BadImageError:
        boxes = []  # Who decodes the image replaces it.
    return {
        "key": key,
        "image": image,
        "text": [caption.encode() for caption in record.captions],
        "label": record.schema.label,
        "class_name": record.schema.class_name,
        "boxes": _columns(boxes, ("bbox", "chain", "label", "category")),
        "phrases": _columns(records.phrases(record.schema), _PHRASE),
    }


def _columns(rows: list[dict], names: tuple[str, ...]) -> dict[str, list]:
    """Rows as prepared records have them: a list of each name."""
    return {name: [row[name] for row in rows] for name in names}
