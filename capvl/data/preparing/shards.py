"""One shard of image-text pairs -> one shard of a tfds data set in ArrayRecord files.

A part is made once and whole: its records, its rows (what is known of each record, for finding
duplicates) and its report. Leaving out duplicates makes a second, thinner file of it.
"""

import collections
import hashlib
import json
import re
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from etils import epath

from capvl import storage
from capvl.data.images import video
from capvl.data.images.decode import aspect_size, resize
from capvl.data.preparing.filters import Filters
from capvl.data.reading import records
from capvl.data.reading.rejected import Rejected, RejectedError
from capvl.data.reading.samples import NO_NAMES, Names, samples

# GIT's pre-training images were stored with short sides of at most 384 pixels.
FRAME_SIDE = 384


class Row(NamedTuple):
    """What is known of a record: its key, its hashes by kind, pixels, characters of all captions, bytes, and a hash of
    all of it (the last two once it is written)."""

    key: str
    hashes: dict[str, str]
    height: int
    width: int
    text: int
    bytes: int = 0
    content: str = ""


def features(frames: int = 0):
    """The schema: image (or frames of a clip), captions, label, boxes, phrases, and the whole JSON."""
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    text, integer = tfds.features.Text, np.int64
    image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg" if frames else None)
    return tfds.features.FeaturesDict(
        {
            "key": text(),
            **({"frames": tfds.features.Sequence(image)} if frames else {"image": image}),
            "text": tfds.features.Sequence(text()),
            "label": integer,
            "class_name": text(),
            # Boxes and phrases of one `chain` are about one entity.
            "boxes": tfds.features.Sequence(
                {"bbox": tfds.features.BBoxFeature(), "chain": text(), "label": integer, "category": text()}
            ),
            "phrases": tfds.features.Sequence(
                {"phrase": text(), "chain": text(), "sentence": integer, "first_word": integer, "num_words": integer}
            ),
            "json": text(),
        }
    )


def to_example(
    key: str, members: dict[str, bytes], filters: Filters, frames: int = 0, names: Names = NO_NAMES
) -> tuple[dict[str, Any], Row]:
    """One sample in the schema, and what is known of it.

    Args:
      key: its name in the shard.
      members: suffix -> bytes.
      filters: what is let in.
      frames: of clips, of which so many are kept; 0 for images.
      names: of what holds the image and the captions.

    Raises:
      RejectedError: with the reason.
    """
    kept = _frames(members, frames) if frames else []
    image = kept[len(kept) // 2] if kept else records.image(members, names.image)
    pixels = filters.check_image(image)
    height, width = pixels.shape[:2]
    record = records.read(members, names.text)
    captions, url = record.captions or [""], record.meta.get("url")
    filters.check_texts(captions, url if isinstance(url, str) else "")
    example = {
        "key": key,
        **({"frames": kept} if frames else {"image": image}),
        "text": captions,
        "label": record.schema.label,
        "class_name": record.schema.class_name,
        "boxes": _boxes(record.schema, (height, width)),
        "phrases": records.phrases(record.schema),
        "json": json.dumps(record.meta, ensure_ascii=False),
    }
    return example, Row(key, filters.hashes(pixels, captions), height, width, sum(map(len, captions)))


def _frames(members: dict[str, bytes], count: int) -> list[bytes]:
    """JPEGs of `count` frames: of a video, else of the pictures f00.jpg, f01.jpg … of the sample."""
    pictures = [members[name] for name in sorted(members) if re.fullmatch(r"f\d+\.jpe?g", name)]
    if pictures:
        if len(pictures) < count:
            raise RejectedError("too few frames")
        return [pictures[int((i + 0.5) * len(pictures) / count)] for i in range(count)]
    film = next((members[s] for s in video.SUFFIXES if s in members), None)
    if film is None:
        raise RejectedError("no video")
    try:
        return [encode_jpeg(frame) for frame in video.read_frames(film, count)]
    except video.BadVideoError as e:
        raise RejectedError("too few frames" if "are needed" in str(e) else "undecodable video") from e


def encode_jpeg(pixels) -> bytes:
    """A frame as JPEG, its short side at most FRAME_SIDE pixels."""
    height, width = pixels.shape[:2]
    if min(height, width) > FRAME_SIDE:
        pixels = resize(pixels, *aspect_size(height, width, FRAME_SIDE, height + width))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90)


def _boxes(schema: records.Schema, size: tuple[int, int]):
    """Rows of the `boxes` feature."""
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    return [row | {"bbox": tfds.features.BBox(*row["bbox"])} for row in records.boxes(schema, size)]


def write_shard(source: str, part: str, filters: Filters, frames: int = 0, names: Names = NO_NAMES) -> None:
    """Writes a shard's part, its rows and, last, its report; does nothing where the report is there.

    Args:
      source: a tar or parquet file.
      part: path of the records; the others have `.rows.json` and `.json` added.
      filters: what is let in.
      frames, names: see `to_example`.

    Raises:
      UserError: storage failed again and again.
    """
    if not storage.folder(part + ".json").exists():
        storage.retry(_write_shard, source, part, filters, frames, names, what=f"Preparing {source!r}")


def _write_shard(source: str, part: str, filters: Filters, frames: int, names: Names) -> None:
    # Slow to import.
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    schema, rejected, rows = features(frames), Rejected(), {}
    with storage.new_file(storage.folder(part)) as file:
        writer = ArrayRecordWriter(file, "group_size:1")
        try:
            for key, members in samples(source, filters.max_bytes, rejected.count, names):
                try:
                    if key in rows:
                        raise RejectedError("duplicate key")
                    example, row = to_example(key, members, filters, frames, names)
                except RejectedError as e:
                    rejected.count(str(e), key)
                    continue
                record = schema.serialize_example(schema.encode_example(example))
                # A map's order is by chance; the same input shall give the same file.
                record = tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)
                content = hashlib.blake2b(record, digest_size=12).hexdigest()
                rows[key] = row._replace(bytes=len(record), content=content)
                writer.write(record)
        finally:
            writer.close()
    storage.replace_text(storage.folder(part + ".rows.json"), json.dumps([list(row) for row in rows.values()]))
    _write_report(part, list(rows.values()), rejected)


def read_rows(part: str) -> list[Row]:
    """The rows of a part, in order of its records."""
    return [Row(*row) for row in storage.read_json(storage.folder(part + ".rows.json"))]


def thin_shard(part: str, dropped: dict[int, str]) -> None:
    """Writes `part`.kept, without some records, and its report; the part itself stays as it was.

    Args:
      part: path of the records.
      dropped: number of a record -> reason.
    """
    storage.retry(_thin_shard, part, dropped, what=f"Thinning {part!r}")


def _thin_shard(part: str, dropped: dict[int, str]) -> None:
    # Slow to import.
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    rows = read_rows(part)
    rejected = Rejected(read_report(part)["rejected"])
    with storage.local_copy(storage.folder(part)) as whole, storage.new_file(storage.folder(part + ".kept")) as file:
        reader, writer = ArrayRecordReader(whole), ArrayRecordWriter(file, "group_size:1")
        try:
            for number, row in enumerate(rows):
                if number in dropped:
                    rejected.count(dropped[number], row.key)
                else:
                    writer.write(reader.read([number])[0])
        finally:
            writer.close()
            reader.close()
    _write_report(part + ".kept", [row for n, row in enumerate(rows) if n not in dropped], rejected)


def _write_report(part: str, rows: list[Row], rejected: Rejected) -> None:
    sides, texts = collections.Counter(), collections.Counter()
    for row in rows:
        sides[str(_power(min(row.height, row.width)))] += 1
        texts[str(_power(row.text))] += 1
    report = {
        "examples": len(rows),
        "bytes": sum(row.bytes for row in rows),
        "rejected": rejected,
        "short_side": sides,
        "text_length": texts,
    }
    storage.replace_text(storage.folder(part + ".json"), json.dumps(report, sort_keys=True))


def _power(n: int) -> int:
    """The largest power of two that is at most n."""
    return 1 << max(n.bit_length() - 1, 0)


def read_report(part: str) -> dict:
    """Of a part: examples, bytes, rejected, and how many have a short side and a text length from each power of two."""
    return storage.read_json(storage.folder(part + ".json"))


def final(part: str) -> epath.Path:
    """The records that go into the data set: thinned where there were duplicates."""
    kept = storage.folder(part + ".kept.json")
    return storage.folder(part + ".kept" if kept.exists() else part)
