"""Data sets of tfds' own catalogue, prepared as ArrayRecord files."""

from capvl.data.reading import sources
from capvl.errors import UserError, nearest


def from_tfds(name: str, data_dir: str) -> str:
    """Downloads and prepares a tfds data set as ArrayRecord.

    Raises:
      UserError: tfds doesn't know it, or can't prepare it here.
    """
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as e:
        raise UserError(f"tfds has no data set {name!r}." + nearest(name, sources.FIELDS)) from e
    except Exception as e:  # Each of tfds' builders has errors of its own.
        first = str(e).strip().splitlines()
        raise UserError(f"tfds could not prepare {name!r}: {type(e).__name__}: {first[0] if first else e}") from e
    return str(builder.data_dir)
