"""GLIP (arXiv 2112.03857): boxes and the words that name them, learned as one: detection as grounding.

Every place of an image's pyramid is trained towards the tokens of the box that ATSS assigns it to, by a focal loss
(section 3.1); where there is a box, also towards the box (GIoU) and how near its middle the place is. Classes come as a
prompt, captions as they are (`capvl.data.examples.grounded`).

Letters: B images and their texts, S slots of true boxes, N places of all levels, L tokens.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from capvl.data.examples import grounded
from capvl.data.examples.grounded import Captions, GroundedText, Texts
from capvl.data.images.buckets import Bucket, Bucketed
from capvl.data.images.crops import Crop
from capvl.data.reading import regions, sources
from capvl.data.reading.classes import categories
from capvl.data.text import tokenizers
from capvl.data.text.category_prompts import NEGATIVES
from capvl.errors import UserError
from capvl.losses import detection
from capvl.losses.assignment import atss
from capvl.losses.detection import detection_losses
from capvl.models.glip import COARSEST, GlipOptions, grids_of
from capvl.models.glip import Glip as GlipModel
from capvl.nn.anchors import anchors, inclusive
from capvl.objectives.images import unit_range


@dataclasses.dataclass(frozen=True)
class Glip:
    """Options and methods of the objective (`capvl.objectives.Objective`).

    Attributes:
      texts: of `capvl.data.examples.grounded.TEXTS`; an example has one that it has boxes for, drawn at every visit.
      order, negatives, full, prefix, packed, signs, sides: see `capvl.data.examples.grounded.Texts`.
      sizes: (height, width) in pixels of the images of a batch, padding included, that batches go through in turn;
        () for the model's own square. Images keep their aspect.
      slots: boxes of an image at most; which ones is drawn where there are more.
      token, box, centerness: weights of the losses.
      contrastive: weight of the contrast of places and tokens (`model.contrast`).
      alpha, gamma: of the focal loss.
      nearest: candidates of a box on each level (ATSS).
      blind: images are made grey: what the texts alone teach.
    """

    texts: tuple[str, ...] = ("captions", "classes")
    order: str = "sampled"
    negatives: int = NEGATIVES
    full: float = 0.5
    prefix: str = ""
    packed: int = 0
    signs: bool = True
    sides: str = "skip"
    sizes: tuple[tuple[int, int], ...] = ()
    slots: int = 100
    token: float = 1.0
    box: float = 2.0
    centerness: float = 1.0
    contrastive: float = 0.0
    alpha: float = detection.ALPHA
    gamma: float = detection.GAMMA
    nearest: int = 9
    blind: bool = False

    Model: ClassVar[type] = GlipOptions

    def __post_init__(self):
        grounded.check_texts(self._texts)
        if min(self.token, self.box, self.centerness, self.contrastive) < 0 or not self.token:
            raise UserError("objective: token must be above 0, and box, centerness and contrastive not negative.")
        if min(self.slots, self.nearest) < 1 or self.gamma < 0 or self.alpha > 1:
            raise UserError(
                "objective: slots and nearest must be at least 1, gamma not negative, and alpha at most 1 (below 0 for "
                "none)."
            )
        for size in self.sizes:
            if len(size) != 2 or min(size) < COARSEST or any(side % COARSEST for side in size):
                raise UserError(
                    f"objective.sizes: {size} should be a height and a width in pixels, multiples of {COARSEST}."
                )

    @property
    def _texts(self) -> Texts:
        return Texts(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Texts) if field.name != "kinds"},
            kinds=self.texts,
        )

    def check(self, model_options: GlipOptions, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where options contradict each other."""
        if model_options.classes and (self.texts != ("classes",) or self.order != "fixed"):
            raise UserError("model.classes, a closed list, goes with objective.texts=('classes',) and order='fixed'.")
        if bool(self.contrastive) != bool(model_options.contrast):
            raise UserError("objective.contrastive, a weight, goes with model.contrast, a width; set both or neither.")
        for height, width in self.sizes:
            if max(height, width) > model_options.image_shape()[0]:
                raise UserError(
                    f"objective.sizes has {(height, width)}, and model.max_side={model_options.max_side} lets no image "
                    "be so long."
                )

    def frozen(self, model_options: GlipOptions) -> tuple[str, ...]:
        """What no loss reaches."""
        return model_options.unread

    def features(self) -> tuple[str, ...]:
        """An image with boxes, captions that name them where there are any, and its data set's list of classes."""
        return ("image", *regions.FEATURES, *regions.DETECTION, "text?", "classes?")

    def buckets(self, model_options: GlipOptions) -> tuple[Bucket, ...]:
        """`sizes`, or the model's own square."""
        return tuple(Bucket(*size) for size in self.sizes) or (Bucket(*model_options.image_shape()[:2]),)

    def transform(self, model_options: GlipOptions, data, *, train: bool):
        """Texts with the boxes that they name."""
        tokenizer = None
        if not model_options.classes:
            tokenizer = tokenizers.load(data.tokenizer_path(), model_options.reads_start)
        crop = Crop.of_model(data, model_options, train=train)
        lists = {
            names: grounded.vocabulary(model_options, tokenizer, names, prefix=self.prefix) for names in _lists(data)
        }
        if (self.order == "fixed" or model_options.classes) and not lists:
            option = f"objective.order={self.order!r}" if self.order == "fixed" else "model.classes"
            raise UserError(f"{option} needs data with a closed list of classes, and {data.name!r} has none.")
        captions, length = self._captions(data) if train else None, model_options.length
        made = GroundedText(crop, tokenizer, length, self.slots, data.flip, train, self._texts, lists, captions)
        return Bucketed(made, self.buckets(model_options)) if train else made

    def _captions(self, data) -> Captions | None:
        if not self.packed:
            return None
        opened = [
            sources.open_source(name, data.split, data.directory(), features=("text?",)) for name, _ in _parts(data)
        ]
        said = tuple(source for source in opened if "text" in source.read(0, ("text?",)))
        if not said:
            raise UserError("objective.packed puts captions around captions, and none of data.name has any.")
        return Captions(said)

    def batch_spec(
        self, model_options: GlipOptions, batch: int, bucket: Bucket | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """image uint8 (B, H, W, 4), text int32 (B, L), counted bool (B, L), left int32 (B,); box float32 (B, S, 4),
        slots bool (B, S) and positive bool (B, S, L)."""
        slots, length = (batch, self.slots), model_options.length
        return {
            "image": jax.ShapeDtypeStruct((batch, *(bucket or model_options.image_shape()[:2]), 4), jnp.uint8),
            "text": jax.ShapeDtypeStruct((batch, length), jnp.int32),
            "counted": jax.ShapeDtypeStruct((batch, length), jnp.bool_),
            "box": jax.ShapeDtypeStruct((*slots, 4), jnp.float32),
            "slots": jax.ShapeDtypeStruct(slots, jnp.bool_),
            "positive": jax.ShapeDtypeStruct((*slots, length), jnp.bool_),
            "left": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1]; the box that each place is trained on, and what losses are divided by, as shares of the
        rows: over the whole batch, whatever part of it a device or a micro-batch has."""
        image = unit_range(batch["image"])
        size = image.shape[1:3]
        anchors_N4 = anchors(grids_of(size))
        places = [rows * columns for rows, columns in grids_of(size)]
        boxes_BS4 = inclusive(batch["box"], size)
        slot_BN = atss(anchors_N4, places, boxes_BS4, batch["slots"], nearest=self.nearest)
        found = detection.targets(anchors_N4, slot_BN, boxes_BS4)
        by, rows = detection.divisors(found), len(image)
        if self.blind:
            image = jnp.asarray(image).at[..., :3].set(0.0)
        return {
            "image": image,
            "text": batch["text"],
            "counted": batch["counted"],
            "positive": batch["positive"],
            "left": batch["left"],
            "targets": found,
            "by": jax.tree.map(lambda total: jnp.full(rows, total / rows), by),
        }

    def loss(self, model: GlipModel, batch, key):
        """The weighted sum of the three losses, each in metrics; besides, of places with a box their mean number an
        image, and boxes an image that found no room."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        text_BL = batch["text"]
        maps = model.encode(batch["image"], key=keys[0])
        aligned = model.align(maps, model.states(text_BL, key=keys[1]), text_BL, key=keys[2])
        anchors_N4 = anchors(aligned.grids)
        by = jax.tree.map(jnp.sum, batch["by"])
        heads = aligned.logits_BNL, aligned.deltas_BN4, aligned.centerness_BN
        words = batch["positive"], batch["counted"], by
        found = detection_losses(*heads, anchors_N4, batch["targets"], *words, alpha=self.alpha, gamma=self.gamma)
        total = self.token * found.token + self.box * found.box + self.centerness * found.centerness
        more = {}
        if self.contrastive:
            positive_BNL = detection.of_places(batch["targets"].slot_BN, batch["positive"])
            contrast = detection.contrastive(aligned.contrast_BNL, positive_BNL, batch["counted"]) / by.positives
            total, more = total + self.contrastive * contrast, {"contrastive": contrast}
        positives_B = batch["targets"].positive_BN.sum(axis=1).astype(jnp.float32)
        return total, {
            "loss": total,
            "token": found.token,
            "box": found.box,
            "centerness": found.centerness,
            "places": positives_B.mean(),
            "left": batch["left"].astype(jnp.float32).mean(),
            **more,
        }

    def flops(self, model_options: GlipOptions) -> float:
        """Three forward passes: the backward one is two. Of images in the mean of the buckets."""
        sizes = self.buckets(model_options)
        return 3 * sum(model_options.flops(*size) for size in sizes) / len(sizes)


def _parts(data) -> list[tuple[str, float]]:
    return [part for part in data.parts() if not part[0].startswith("stream:")]


def _lists(data) -> list[tuple[str, ...]]:
    """The closed lists of classes of the data sets of a mixture."""
    opened = (sources.open_source(name, data.split, data.directory(), features=("image",)) for name, _ in _parts(data))
    names = (tuple(category.name for category in categories(source)) for source in opened)
    return list(dict.fromkeys(own for own in names if own))
