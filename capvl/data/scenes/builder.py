"""The tfds builder of procedural scenes; it writes ArrayRecord without TensorFlow."""

import dataclasses
import functools
import multiprocessing
import os

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from capvl.data.scenes import examples, statements, world


@dataclasses.dataclass(eq=False)
class ScenesConfig(tfds.core.BuilderConfig):
    """Which scenes.

    Attributes:
      side: image side in pixels.
      frames: 0 for images, else frames of a clip.
      stated: 0 for captioned images; else of how many scenes, 1 or 2, statements are (`capvl.data.scenes.statements`).
      most, zoom, plain, words: of `world.draw_scene`.
      apart: the splits whose every image has a held-out pair of a colour and a shape (`world.APART`), while no image of
        the others has one; () for no such rule.
      classes: pairs of a colour and a shape; `objects` are then those of these classes, the others stand there unnamed.
        () for objects without classes, all of them.
      counts: examples of train, val and test.
      seed: of everything.
    """

    side: int = 64
    frames: int = 0
    stated: int = 0
    most: int = 6
    zoom: float = 1.0
    plain: bool = False
    words: float = 1 / 3
    apart: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    counts: tuple[int, int, int] = (20_000, 1_000, 1_000)
    seed: int = 0


def _config(name: str, **options) -> ScenesConfig:
    return ScenesConfig(name=name, description=name, version=tfds.core.Version("1.0.0"), **options)


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Images (or short clips) of simple objects with captions, boxes, phrases and questions.

    Example keys: `image` (JPEG), `text` (captions), `objects` (bbox as tfds BBox, phrase, shape,
    color, size, texture, word), `questions` (kind, question, answer), `label` (shape of the
    largest shaped object, an index into `world.SHAPES`), `index`. Clips have `frames` instead
    of `image` and the `direction` of what moves. Of statements there are `image`, or `images` (a list of two), and
    `questions` (id, kind, question, answer), whose answer is what holds. Where there are classes, `objects` have a
    `label` and `category` of them. Where pairs are held out, no caption of a split without such pairs names one, though
    questions may ask after one.
    """

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = epath.Path(__file__).parent
    BUILDER_CONFIGS = [
        _config("64"),
        _config("96", side=96),
        _config("128", side=128),
        _config("tiny", counts=(256, 64, 64)),
        _config("demo", counts=(6_000, 400, 400)),
        _config("few", most=3, zoom=1.4, plain=True, words=0.5, counts=(20_000, 500, 500)),
        _config("clips_few", frames=6, most=3, zoom=1.4, plain=True, words=0.0, counts=(4_000, 400, 400)),
        _config("clips", frames=8, counts=(4_000, 500, 500)),
        _config("clips_tiny", frames=4, counts=(32, 8, 8)),
        *(
            _config(name, side=side, most=4, zoom=1.2, plain=True, words=0.0, apart=apart, classes=own, counts=counts)
            for name, side, apart, own, counts in (
                ("pairs_apart", 64, ("test",), world.PAIRS, (20_000, 500, 500)),
                ("pairs_apart_96", 96, ("test",), world.PAIRS, (20_000, 500, 500)),
                ("pairs_apart_tiny", 64, ("test",), world.PAIRS, (128, 32, 32)),
            )
        ),
        _config(
            "held_out_96", side=96, words=0.0, apart=tuple(world.SPLITS), classes=world.APART, counts=(2_000, 200, 500)
        ),
        *(
            _config(f"{name}{size}", stated=scenes, most=4, zoom=1.2, plain=True, words=0.0, counts=counts)
            for scenes, name in ((1, "statements"), (2, "pairs"))
            for size, counts in (("", (12_000, 1_000, 1_000)), ("_tiny", (64, 16, 16)))
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text, image = tfds.features.Text, tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        if self.builder_config.stated:
            asked = {name: text() for name in ("id", "kind", "question", "answer")}
            features = {"questions": tfds.features.Sequence(asked), "index": np.int64}
            pair = self.builder_config.stated == 2
            features |= {"images": tfds.features.Sequence(image)} if pair else {"image": image}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
        things = {name: text() for name in ("phrase", "shape", "color", "size", "texture", "word")}
        if self.builder_config.classes:
            names = self.builder_config.classes
            things |= {"label": tfds.features.ClassLabel(names=names), "category": text()}
        features = {
            "text": tfds.features.Sequence(text()),
            "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature(), **things}),
            "questions": tfds.features.Sequence({name: text() for name in ("kind", "question", "answer")}),
            "label": tfds.features.ClassLabel(names=[*world.SHAPES, "word"]),
            "index": np.int64,
        }
        if self.builder_config.frames:
            features |= {"frames": tfds.features.Sequence(image), "direction": text()}
        else:
            features["image"] = image
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager
        counts = self.builder_config.counts
        return {split: self._generate_examples(split, n) for split, n in zip(world.SPLITS, counts, strict=True)}

    def _generate_examples(self, split: str, count: int):
        config = self.builder_config
        options = dict(most=config.most, zoom=config.zoom, plain=config.plain, words=config.words)
        if config.apart:
            options["apart"] = "always" if split in config.apart else "never"
        maker = (statements.make, config.stated) if config.stated else (examples.make, config.frames)
        make = functools.partial(maker[0], config.seed, split, config.side, maker[1], **options)
        # Spawned, not forked: JAX's threads may be running.
        with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 1 + count // 500)) as pool:
            for index, example in enumerate(pool.imap(make, range(count), chunksize=32)):
                if config.classes:
                    example["objects"] = _of_classes(example["objects"], config.classes)
                for thing in example.get("objects", ()):
                    x0, y0, x1, y1 = thing["bbox"]
                    thing["bbox"] = tfds.features.BBox(ymin=y0, xmin=x0, ymax=y1, xmax=x1)
                yield index, example


def _of_classes(things: list[dict], classes: tuple[str, ...]) -> list[dict]:
    """Those of these classes, with `label` and `category`."""
    named = ((f"{thing['color']} {thing['shape']}", thing) for thing in things)
    return [thing | {"label": name, "category": name} for name, thing in named if name in classes]
