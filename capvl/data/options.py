"""`config.data`: what a recipe trains on."""

import dataclasses
import os
import re
from collections.abc import Collection

from capvl.data.images import randaugment
from capvl.data.images.decode import PILLOW
from capvl.data.reading import sources
from capvl.data.reading.patterns import expand
from capvl.data.scenes import making
from capvl.errors import UserError, nearest
from capvl.lines import read_lines

CROPS = ("random", "center", "center_floor", "squash")

_KIND = re.compile(r"(?:^\s*|\s+\+\s+)([A-Za-z_]\w*)=")
"""What stands before the data of a kind of batch."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """`config.data`: what a recipe trains on.

    Attributes:
      name: a data set (`capvl.data.reading.sources.open_source`), a mixture with weights such as
        "flickr8k*0.7 + scenes/64*0.3", or "stream:FILES" for tar, parquet, TFRecord or ArrayRecord shards
        ("stream:gs://bucket/{00000..00099}.tar"), also as parts of a mixture: "stream:FILES*0.7 + scenes/64*0.3", with
        blanks around each +. A stream that is a mixture's part has a weight where its text ends in *NUMBER. Where an
        objective takes several kinds of batch, each has its own:
        "pairs=stream:FILES + regions=visual_genome*0.5 + coco".
      split: of every data set.
      data_dir: where prepared data sets are; "" for $TFDS_DATA_DIR or ~/tensorflow_datasets.
      image, text: names of the features where the table in `sources` doesn't know them; of streams the column, the
        suffix or (text) the key of the JSON, where it isn't called as these are.
      class_names: file of names by label, one a line or a JSON list, where the data set's own are codes.
      tokenizer: path of a SentencePiece model; "" for the one that belongs to the data set.
      crop: "random" (`eval_crop` in evaluations), "center", "center_floor" (as transformers rounds) or "squash".
      eval_crop: another of these, for evaluations where training crops at random.
      crop_fraction: but for random crops, the part of the resized image's side that is kept; see
        `capvl.data.images.crops.Crop`.
      crop_scale, crop_ratio: area and aspect ranges of random crops.
      interpolation: "fast", or Pillow's "bicubic" (CLIP, GIT, SigLIP) or "bilinear".
      flip: flip half of the images (captions that name sides become wrong).
      randaugment: "photometric" (colours only), "all" (boxes follow what is moved) or "" (none), in training; see
        `capvl.data.images.randaugment`.
      threads: batches that are made at once.
      workers: processes that make batches; 0 for threads of this one.
      prefetch: batches that are made ahead.
      max_bad: share of examples that may be bad, or without a text or label that is needed, before the run stops.
      shots: train on so many images of each class (`capvl.data.reading.shots`); 0 for all of them.
      shots_seed: which ones; 0 for the first by their ids.
      readers, window: streams only: how many places of their files are read at once, and how many records are shuffled
        among one another, over all of these (`capvl.data.reading.stream_order`).
      index: streams only: folder of the index of their files; "" for one in the data directory. Of several streams it
        holds a folder each.
    """

    name: str = "scenes/64"
    split: str = "train"
    data_dir: str = ""
    image: str = ""
    text: str = ""
    class_names: str = ""
    tokenizer: str = ""
    crop: str = "random"
    eval_crop: str = "center"
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    crop_fraction: float = 1.0
    interpolation: str = "fast"
    flip: bool = False
    randaugment: str = ""
    threads: int = 2
    workers: int = 0
    prefetch: int = 4
    max_bad: float = 0.05
    shots: int = 0
    shots_seed: int = 0
    readers: int = 32
    window: int = 10_000
    index: str = ""

    def __post_init__(self):
        known_values = {
            "crop": CROPS,
            "eval_crop": CROPS[1:],
            "interpolation": ("fast", *PILLOW),
            "randaugment": randaugment.KINDS,
        }
        for name, known in known_values.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"data.{name}={value!r} is unknown." + nearest(value, known))
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if not 0 < low <= high:
                raise UserError(f"data.{name} must be a range of positive numbers, not {(low, high)}.")
        if not 0 < self.crop_fraction <= 1:
            raise UserError(f"data.crop_fraction must be above 0 and at most 1, not {self.crop_fraction}.")
        if self.crop_scale[1] > 1:
            raise UserError(f"data.crop_scale is a share of the image's area and ends at 1, not {self.crop_scale[1]}.")
        for name in ("threads", "prefetch", "readers", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, not {getattr(self, name)}.")
        if self.shots < 0 or self.shots_seed < 0:
            raise UserError("data.shots and data.shots_seed must not be negative.")
        if self.shots and "stream:" in self.name:
            raise UserError(f"data.shots={self.shots} needs a prepared data set: a stream is never read as a whole.")
        if self.workers < 0 or not 0 <= self.max_bad <= 1:
            raise UserError("data.workers must not be negative, and data.max_bad must be between 0 and 1.")

    @property
    def still_crop(self) -> str:
        """The crop where nothing is drawn: in evaluations."""
        return self.eval_crop if self.crop == "random" else self.crop

    def directory(self) -> str:
        """Where prepared data sets are."""
        return os.path.expanduser(self.data_dir) or sources.default_data_dir()

    def fields(self) -> sources.Fields | None:
        """Feature names, and names of classes, that the user gave."""
        if not self.image and not self.text and not self.class_names:
            return None
        path = self.class_names.replace("{data_dir}", self.directory())
        names = read_lines(path, "class names") if path else []
        return sources.Fields(image=self.image or "image", text=self.text, names=tuple(names))

    def kinds(self) -> dict[str, "DataOptions"]:
        """The options of each kind of batch by name; {"": these} where the name tells no kinds."""
        before, *rest = _KIND.split(self.name)
        if not rest:
            return {"": self}
        names, values = rest[::2], rest[1::2]
        if before.strip() or len(set(names)) < len(names):
            raise UserError(f"data.name={self.name!r} should read KIND=DATA + KIND=DATA, with each kind once.")
        return {k: dataclasses.replace(self, name=v.strip()) for k, v in zip(names, values, strict=True)}

    def of_kinds(self, names: Collection[str]) -> dict[str, "DataOptions"]:
        """The options of the kinds of batch that an objective takes.

        Raises:
          UserError: one has no data, or there is data of others.
        """
        found = self.kinds()
        if "" in found and len(names) == 1:
            return dict.fromkeys(names, self)
        if set(found) != set(names):
            wanted = "no kinds of batch" if set(names) == {""} else f"the kinds of batch {', '.join(names)}"
            form = "NAME" if set(names) == {""} else " + ".join(f"{n}=NAME" for n in names)
            raise UserError(f"The objective takes {wanted}: data.name should read {form}, not {self.name!r}.")
        return {name: found[name] for name in names}

    def first(self) -> "DataOptions":
        """The options of the first kind of batch, whose data sets evaluators take where none is named."""
        return next(iter(self.kinds().values()))

    def parts(self) -> list[tuple[str, float]]:
        """(data set or "stream:FILES", weight) of the mixture, of the first kind of batch.

        Raises:
          UserError: it is none.
        """
        name = self.first().name.strip()
        if "stream:" not in name:
            return [self._prepared(part) for part in name.split("+")]
        texts = re.split(r"\s\+\s", name)
        if len(texts) == 1 or _is_file(name):
            if not name.startswith("stream:"):
                raise UserError(f"data.name={self.name!r} should have blanks around each + where streams are mixed.")
            return [(name, 1.0)]
        return [self._streamed(t.strip()) if t.strip().startswith("stream:") else self._prepared(t) for t in texts]

    def _prepared(self, part: str) -> tuple[str, float]:
        match = re.fullmatch(r"\s*([^*\s]+)\s*(?:\*\s*([0-9.eE-]+)\s*)?", part)
        return (match[1], self._weight(match[2] or "1")) if match else ("", self._weight(""))

    def _streamed(self, part: str) -> tuple[str, float]:
        """In a mixture a number behind the last * is a weight, whatever files a glob would find."""
        match = re.fullmatch(r"(.*\S)\s*\*\s*([0-9.]+(?:[eE]-?[0-9]+)?)", part)
        return (match[1], self._weight(match[2])) if match else (part, 1.0)

    def _weight(self, text: str) -> float:
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise UserError(f"data.name={self.name!r} should read NAME or NAME*WEIGHT + NAME*WEIGHT.")
        return weight

    def check_prepared(self) -> None:
        """Raises UserError where a data set is unknown or not prepared; makes the embedded one."""
        for options in self.kinds().values():
            for name, _ in options.parts():
                if name.startswith("stream:"):
                    expand(name.removeprefix("stream:"))
                else:
                    sources.find(name, self.directory())

    def tokenizer_path(self) -> str:
        """Path of the SentencePiece model."""
        if self.tokenizer:
            for kind in ("wordpiece", "statements"):
                if self.tokenizer == f"{{data_dir}}/scenes/{making.TOKENIZERS[kind]}":
                    return making.scenes_tokenizer(self.directory(), kind)
            return os.path.expanduser(self.tokenizer.replace("{data_dir}", self.directory()))
        if self.parts()[0][0].startswith("stream:"):
            raise UserError("data.tokenizer is not set, and a stream has none of its own; set data.tokenizer=FILE.")
        if self.parts()[0][0].split("/")[0] == "scenes":
            return making.scenes_tokenizer(self.directory())
        raise UserError(
            "data.tokenizer is not set; train one with "
            f"`python -m capvl.data.tokenizer --data={self.parts()[0][0]} --vocab=N --out=FILE` and "
            "set data.tokenizer=FILE."
        )


def _is_file(name: str) -> bool:
    """Whether the text of one stream, which looks like a mixture, is that of local files with + in their names."""
    pattern = name.removeprefix("stream:")
    if not name.startswith("stream:") or "://" in pattern or re.search(r"\s\+\s+stream:", pattern):
        return False
    try:
        return bool(expand(pattern))
    except UserError:
        return False
