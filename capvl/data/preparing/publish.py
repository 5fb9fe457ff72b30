"""What data sets may be called, and the last step of making one: shards get their final names, tfds' metadata is
written, the folder is shown.
"""

import re
from typing import NamedTuple

from etils import epath

from capvl import storage
from capvl.errors import UserError

VERSION = "1.0.0"
EMBEDDED = "scenes"


class Shard(NamedTuple):
    """A file of ArrayRecord with so many examples and bytes of records."""

    file: epath.Path
    examples: int
    bytes: int


def check_name(name: str) -> None:
    """Whether a data set that is made here can have this name: what tfds finds again in the names of its files.

    Raises:
      UserError: it can't; with the nearest that can.
    """
    # tfds is slow to import.
    from tensorflow_datasets.core import naming

    if name == EMBEDDED:
        raise UserError(f"The name {name!r} belongs to the embedded data set; choose another.")
    # Its pattern would let a line's end through.
    if naming.is_valid_dataset_and_class_name(name) and not name.endswith("\n"):
        return
    near = re.sub(r"\W+", "_", name).strip("_")
    near = near if re.match("[a-zA-Z]", near) else f"data_{near}".rstrip("_")
    raise UserError(
        f"A data set can't be called {name!r}: its name is a letter of a to z, then letters, digits and _, such as "
        f"{near!r}."
    )


def publish(
    folder: epath.Path,
    name: str,
    features,
    splits: dict[str, list[Shard]],
    description: str,
    files: dict[str, str],
) -> None:
    """Makes a data set appear under its name, whole or not at all.

    Args:
      folder: NAME/VERSION, which isn't there yet.
      name: of the data set.
      features: tfds' FeaturesDict of the records.
      splits: shards by split; empty ones are left out.
      description: for tfds.
      files: further files, name -> text.
    """
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    staging = folder.with_name(folder.name + ".staging")
    staging.rmtree(missing_ok=True)
    staging.mkdir(parents=True)
    infos = []
    for split, shards in splits.items():
        own = [shard for shard in shards if shard.examples]
        template = tfds.core.ShardedFileTemplate(
            data_dir=staging, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        for i, shard in enumerate(own):
            storage.place(shard.file, template.sharded_filepath(shard_index=i, num_shards=len(own)))
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[shard.examples for shard in own],
                num_bytes=sum(shard.bytes for shard in own),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(staging),
        features=features,
        split_infos=infos,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        description=description,
        check_data=False,
    )
    for file, text in files.items():
        storage.replace_text(staging / file, text)
    staging.rename(folder)
