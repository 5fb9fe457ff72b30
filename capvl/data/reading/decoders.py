"""Records of prepared data sets, which are tf.train.Example messages -> Examples."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from capvl.errors import UserError

_TABLES = ("objects", "boxes", "crowds", "phrases", "attributes")
_PLAIN = ("image", "images", "text", "label", "frames")
_LISTS = ("negative", "not_exhaustive")
CLOSED = "classes"
"""A key of Examples that is no feature: the names of the closed list of classes of the data set that it is from, by
label, by which each Example of a mixture is read. "classes?" leaves it out where there is no such list."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """Which feature is the image, the text and the label; "a/b" is feature b of a sequence a.

    `names` are the classes' names by label, where the data set's own are not meant to be read.
    """

    image: str = "image"
    text: str = ""
    label: str = ""
    names: tuple[str, ...] = ()


class Decoder:
    """Bytes of a record -> an Example with the features asked for."""

    def __init__(self, known, fields: Fields, features: tuple[str, ...], name: str):
        """Where each feature stands.

        Args:
          known: tfds' FeaturesDict of the data set.
          fields: which feature is what.
          features: keys that Examples shall have; "KEY?" only where the data set has it.
          name: of the data set.

        Raises:
          UserError: it has no such feature.
        """
        # tfds is slow to import.
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2

        self._name, self._known, self._parse = name, known, tf_example_pb2.Example.FromString
        self._classes = class_names(known) if CLOSED in {feature.rstrip("?") for feature in features} else ()
        if CLOSED in features and not self._classes:
            raise UserError(f"Data set {name!r} has no closed list of classes: its boxes have no labels with names.")
        wanted = _paths(known, fields, tuple(f for f in features if f.rstrip("?") != CLOSED))
        self._label_names: list[str] | None = None
        if "class_name" in wanted and fields.names:
            self._label_names, wanted["class_name"] = list(fields.names), fields.label or "label"
        elif "class_name" in wanted and wanted["class_name"] not in known:
            label = fields.label or "label"
            if label in known and getattr(known[label], "names", None):
                self._label_names = list(known[label].names)
                wanted["class_name"] = label
        self._paths = {key: path.split("/") for key, path in wanted.items()}
        _check_features(name, known, wanted)
        # Images, texts, labels and regions are taken straight from the tf.train.Example, in a tenth of the
        # time that tfds needs to rebuild the whole record; the rest is left to tfds.
        plain = (*_PLAIN, *(k for k in _LISTS if k in known and _texts(known[k])))
        self._plain = {k: "/".join(p) for k, p in self._paths.items() if k in plain}
        tables = {k: _table(known[k]) for k, p in self._paths.items() if k in _TABLES and p == [k]}
        self._tables = {k: columns for k, columns in tables.items() if columns}
        self._rest = {k: p for k, p in self._paths.items() if k not in self._plain and k not in self._tables}
        self._decoder = None
        if self._rest:
            self._decoder = tfds.features.FeaturesDict({path[0]: known[path[0]] for path in self._rest.values()})

    @property
    def features(self) -> set[str]:
        """The data set's features that Examples are made of."""
        return {path[0] for path in self._paths.values()}

    def __call__(self, record: bytes) -> dict[str, Any]:
        """The Example of a record.

        Raises:
          UserError: its label has no name.
        """
        features = self._parse(record).features.feature
        example: dict[str, Any] = {CLOSED: self._classes} if self._classes else {}
        for key, path in self._plain.items():
            if key == "label":
                example[key] = features[path].int64_list.value[0]
            else:
                values = features[path].bytes_list.value
                example[key] = values[0] if key == "image" else list(values)
        for key, columns in self._tables.items():
            example[key] = {name: _column(features[f"{key}/{name}"], kind) for name, kind in columns.items()}
        if self._decoder is not None:
            rest = self._decoder.deserialize_example_np(record)
            example |= {key: _get(rest, path) for key, path in self._rest.items()}
        if self._label_names is not None:
            label = int(example["class_name"])
            if not -1 <= label < len(self._label_names):
                raise UserError(
                    f"Data set {self._name!r} has the label {label}, and {len(self._label_names)} class names."
                )
            example["class_name"] = self._label_names[label] if label >= 0 else ""
        return example

    def label_names(self) -> list[str] | None:
        """Names of the classes, where the data set has them."""
        feature = self._known[self._paths["label"][0]] if "label" in self._paths else None
        return list(feature.names) if getattr(feature, "names", None) else None


def class_names(known) -> tuple[str, ...]:
    """Names of the classes that boxes have, by label; () where there is no closed list.

    Args:
      known: tfds' FeaturesDict of a data set.
    """
    for name in ("boxes", "objects"):
        rows = getattr(known[name], "feature", {}) if name in known else {}
        if "label" in rows and getattr(rows["label"], "names", None):
            return tuple(rows["label"].names)
    return ()


def _texts(feature) -> bool:
    """Whether a feature is a list of texts."""
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.Text)


def _table(feature) -> dict[str, Any] | None:
    """name -> dtype (None for boxes) of the columns of a sequence of plain values; None where there are others."""
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    inner = getattr(feature, "feature", None)
    if not isinstance(feature, tfds.features.Sequence) or not isinstance(inner, tfds.features.FeaturesDict):
        return None
    columns = {}
    for name, leaf in inner.items():
        if isinstance(leaf, tfds.features.BBoxFeature):
            columns[name] = None
        elif isinstance(leaf, tfds.features.Text):
            columns[name] = np.dtype(object)
        elif type(leaf) in (tfds.features.ClassLabel, tfds.features.Scalar, tfds.features.Tensor) and leaf.shape == ():
            columns[name] = np.dtype(leaf.np_dtype)
        else:
            return None
    return columns if all(d is None or d.kind in "Obif" for d in columns.values()) else None


def _column(feature, dtype: np.dtype | None) -> np.ndarray:
    """Values (N,) of a column, boxes (N, 4)."""
    if dtype is None:
        return np.array(feature.float_list.value, np.float32).reshape(-1, 4)
    kind = {"O": feature.bytes_list, "f": feature.float_list}.get(dtype.kind, feature.int64_list)
    return np.array(list(kind.value), dtype)


def _get(record: Any, path: Sequence[str]) -> Any:
    for i, part in enumerate(path):
        if isinstance(record, list):
            return [_get(r, path[i:]) for r in record]
        record = record[part]
    return record


def _paths(known, fields: Fields, features: tuple[str, ...]) -> dict[str, str]:
    """Where each feature stands; one that ends in "?" is left out where the data set doesn't have it."""
    paths = {}
    for feature in features:
        bare = feature.rstrip("?")
        path = getattr(fields, bare, "") or bare
        there = path.split("/")[0] in known or (bare == "class_name" and (fields.label or "label") in known)
        if there or not feature.endswith("?"):
            paths[bare] = path
    return paths


def _check_features(name: str, features, wanted: dict[str, str]) -> None:
    for key, path in wanted.items():
        first = path.split("/")[0]
        if first not in features:
            raise UserError(
                f"Data set {name!r} has no {key} feature {path!r}; its features are {', '.join(sorted(features))}."
            )
