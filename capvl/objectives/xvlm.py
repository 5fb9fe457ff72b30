"""X-VLM (arXiv 2111.08276): texts aligned with images and with regions of them, at every grain.

Two kinds of batch: `pairs`, an image and a text of it, and `regions`, an image with boxes and a text of each. Four
losses, of which any may be left out: image-text contrast (ITC), image-text matching with hard negatives (ITM), masked
language modelling (MLM), and, of regions, the box of a text in the whole image (L1 and GIoU); sections 3.2 and 3.3.

Letters: R rows of texts (of pairs as many as images), I images, N image tokens, L tokens, M masked tokens, C, D, E
widths of image tokens, text states and the joint space, Q groups of G images and S regions in each.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from capvl.data.examples.phrases import PAIR_TEXTS, REGION_TEXTS, SIDES, PairText, RegionText, TextReader
from capvl.data.images.crops import Crop
from capvl.data.reading import regions
from capvl.data.text import tokenizers
from capvl.data.text.masking import Masking
from capvl.errors import UserError, nearest
from capvl.losses.boxes import box_losses
from capvl.losses.contrastive import CHUNK, softmax_loss
from capvl.losses.matching import Negatives, hard_negatives, matching_loss
from capvl.losses.ring import take_rows
from capvl.losses.vocabulary import vocabulary_loss
from capvl.models import flops, sizes, xvlm
from capvl.models.features import rows_of
from capvl.models.xvlm import XVlmOptions
from capvl.nn.boxes import centres
from capvl.objectives import Kind
from capvl.objectives.images import unit_range
from capvl.parallel.rows import interleave, part

KINDS = ("pairs", "regions")
LOSSES = ("itc", "itm", "mlm", "l1", "giou")


@dataclasses.dataclass(frozen=True)
class XVlm:
    """Options and methods of the objective (`capvl.objectives.Objective`).

    Attributes:
      kinds: "pairs", "regions" or both; `data.name` says what each is made of.
      share: images with regions for each pair of a step.
      group: (images, texts): of so many images with regions one after another a step takes so many texts, those with a
        low number in their image first.
      slots: regions of an image that are drawn, a caption among them.
      pair_texts: what texts of pairs are: "captions", or "regions" for what regions of the image are called.
      region_texts: by which of "phrases" and "classes" regions are called.
      captions: whether the caption of an image with regions is one of them (its box is the whole image).
      itc, itm, mlm, l1, giou: weights of the losses; 0 leaves one out.
      same_image: texts of the same image aren't each other's negatives, in ITC and ITM (retrieval; the paper's
        pre-training doesn't look).
      among: hard negatives come from so many consecutive rows (the original's: those of a GPU); 0: of the whole batch.
      boxes_of_images: rows of whole images have losses of boxes too.
      masks, mask_share, whole_words, mask_id: of masked language modelling (`capvl.data.text.masking`); mask_id -1: the
        tokenizer's own.
      sides: what becomes of a flip where a text names a side: "skip" or "swap"; flips are asked for by `data.flip`.
      separate: each kind of batch has an update of the optimizer of its own, regions first, as in the original; else
        one update follows the sum.
      blind: images are made grey: what the texts alone teach.
      chunk: texts whose similarities, and tokens whose logits, a device holds at a time.
    """

    kinds: tuple[str, ...] = KINDS
    share: float = 0.1875
    group: tuple[int, int] = (3, 8)
    slots: int = 5
    pair_texts: str = "captions"
    region_texts: tuple[str, ...] = REGION_TEXTS
    captions: bool = True
    itc: float = 1.0
    itm: float = 1.0
    mlm: float = 1.0
    l1: float = 1.0
    giou: float = 1.0
    same_image: bool = False
    among: int = 0
    boxes_of_images: bool = False
    masks: int = 8
    mask_share: float = 0.25
    whole_words: bool = True
    mask_id: int = -1
    sides: str = "skip"
    separate: bool = False
    blind: bool = False
    chunk: int = CHUNK

    Model: ClassVar[type] = XVlmOptions

    def __post_init__(self):
        for name, known in (("kinds", KINDS), ("region_texts", REGION_TEXTS)):
            for value in getattr(self, name):
                if value not in known:
                    raise UserError(f"objective.{name}: {value!r} is unknown." + nearest(value, known))
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise UserError(f"objective.kinds should name {' or '.join(KINDS)} or both, each once, not {self.kinds}.")
        for name, known in (("sides", SIDES), ("pair_texts", PAIR_TEXTS)):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise UserError(f"objective.{name}={value!r} is unknown." + nearest(value, known))
        losses = [getattr(self, name) for name in LOSSES]
        if min(losses) < 0 or not max(losses):
            raise UserError("objective: none of itc, itm, mlm, l1 and giou may be negative, and one must be above 0.")
        images, texts = self.group
        if images < 1 or not 1 <= texts <= images * self.slots or self.chunk < 1 or self.among < 0:
            raise UserError(
                f"objective.group={self.group} should be some images and at most objective.slots={self.slots} texts "
                f"for each of them; chunk must be at least 1, among not negative."
            )
        if self.separate and len(self.kinds) < 2:
            raise UserError("objective.separate=True needs both kinds of batch.")

    def check(self, model_options: XVlmOptions, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where options contradict each other."""
        if self.itm and not self.itc:
            raise UserError("objective.itm draws hard negatives by the similarities that objective.itc trains.")
        heads = {"itc": self.itc, "itm": self.itm, "mlm": self.mlm, "box": self._boxes}
        for head, weight in heads.items():
            if weight and head not in model_options.heads:
                raise UserError(f"The objective has a loss {head!r}, and model.heads={model_options.heads} lacks it.")
            if not weight and head in model_options.heads:
                raise UserError(f"model.heads has {head!r}, which no loss of the objective trains; leave it out.")
        if micro_batches > 1:
            raise UserError(
                f"micro_batches={micro_batches} would leave contrast and matching only the negatives of a part of the "
                f"batch; set micro_batches=1 and save memory with model.remat."
            )
        if "regions" in self.kinds:
            share = self.features()["regions"].share
            images = share * batch_per_device
            # Shares such as 0.7 are not exact.
            if images < 0.5 or abs(images - round(images)) > 1e-6 or round(images) % self.group[0]:
                of_pairs = f"objective.share={self.share:g} of {batch_per_device} pairs on a device are "
                raise UserError(
                    f"{of_pairs if 'pairs' in self.kinds else 'A device has '}{images:g} images with regions, which "
                    f"don't fall into groups of {self.group[0]}, as objective.group={self.group} says."
                )

    def frozen(self, model_options: XVlmOptions) -> tuple[str, ...]:
        """The cross-modal encoder where no loss reaches it, and a MAP head, which nothing reads."""
        return model_options.unread + (() if self._fuses else ("text/cross/.*",))

    @property
    def _boxes(self) -> float:
        return (self.l1 + self.giou) * ("regions" in self.kinds)

    @property
    def _fuses(self) -> bool:
        return bool(self.itm or self.mlm or self._boxes)

    def features(self) -> dict[str, Kind]:
        """An image and its captions, or an image with regions."""
        of_regions = ("image", *regions.FEATURES)
        of_pairs = ("image", "text") if self.pair_texts == "captions" else of_regions
        features = {"pairs": of_pairs, "regions": (*of_regions, "text?")}
        share = {"pairs": 1.0, "regions": self.share if "pairs" in self.kinds else 1.0}
        return {kind: Kind(features[kind], share[kind]) for kind in self.kinds}

    def transform(self, model_options: XVlmOptions, data, *, train: bool):
        """Crops, and texts of the image or of its regions."""
        tokenizer = tokenizers.load(data.tokenizer_path(), model_options.reads_start)
        masking = None
        if self.mlm:
            named = dict(mask_id=self.mask_id if self.mask_id >= 0 else None, whole_words=self.whole_words)
            masking = Masking.for_tokenizer(tokenizer, **named, most=self.masks, share=self.mask_share)
        crop = Crop.of_model(data, model_options, train=train)
        read = TextReader(tokenizer, model_options.length, masking)
        how = crop, read, data.flip, self.sides, train
        photometric = dataclasses.replace(crop, randaugment=crop.randaugment and "photometric")
        made = {
            "pairs": PairText(*how, self.pair_texts, self.region_texts),
            "regions": RegionText(photometric, *how[1:], self.slots, self.captions, self.region_texts),
        }
        return {kind: made[kind] for kind in self.kinds}

    def batch_spec(self, model_options: XVlmOptions, batch: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Of each kind image uint8 (I, R, R, 3), flip bool and id int32 (I,); and of pairs (I, …), of regions
        (I, S, …): text and masked int32 (L,), places and words int32 (M,), cut bool, for regions also box float32 (4,),
        whole and slots bool."""
        length, words = (model_options.length,), (self.masks,)
        text = {"text": (length, jnp.int32), "cut": ((), jnp.bool_)}
        if self.mlm:
            text |= {"masked": (length, jnp.int32), "places": (words, jnp.int32), "words": (words, jnp.int32)}
        region = {"box": ((4,), jnp.float32), "whole": ((), jnp.bool_), "slots": ((), jnp.bool_)}
        image = {"image": (model_options.image_shape(), jnp.uint8), "flip": ((), jnp.bool_), "id": ((), jnp.int32)}
        of_text = {
            "pairs": text,
            "regions": {k: ((self.slots, *shape), dtype) for k, (shape, dtype) in (text | region).items()},
        }
        return {
            kind: {
                k: jax.ShapeDtypeStruct((found.count(batch, kind), *shape), dtype)
                for k, (shape, dtype) in (image | of_text[kind]).items()
            }
            for kind, found in self.features().items()
        }

    def updates(self) -> tuple[tuple[str, ...], ...]:
        """The kinds of batch of each update of the optimizer that a step makes, in their order."""
        return (("regions",), ("pairs",)) if self.separate else (self.kinds,)

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1] and flipped where asked; of each group of images with regions the rows that are taken."""
        return {kind: self._prepared(kind, rows, train) for kind, rows in batch.items()}

    def _prepared(self, kind: str, rows: dict[str, jax.Array], train: bool) -> dict[str, jax.Array]:
        rows = dict(rows)
        image = unit_range(rows.pop("image"), rows.pop("flip") if train else None)
        image = jnp.zeros_like(image) if self.blind else image
        if kind == "regions":
            return {"image": image, **self._taken(rows)}
        there = rows.pop("mask", jnp.ones(len(image), bool))
        return {"image": image, "there": there, **rows}

    def _taken(self, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The texts of each group that are taken, row by row (Q S, …), owner (Q, S), and cut off: those left out."""
        (images, texts), ids = self.group, rows.pop("id")
        groups = len(ids) // images
        mask = rows.pop("mask", jnp.ones(len(ids), bool))

        def by_slot(x):
            """(I, slots, …) -> (Q, slots G, …)."""
            x = jnp.swapaxes(x.reshape(groups, images, self.slots, *x.shape[2:]), 1, 2)
            return x.reshape(groups, self.slots * images, *x.shape[3:])

        there = by_slot(rows.pop("slots") & mask[:, None])
        chosen = jnp.argsort(~there, axis=1, stable=True)[:, :texts]

        def take(x):
            return jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *(1,) * (x.ndim - 2)), axis=1)

        owner = jnp.tile(jnp.arange(images, dtype=jnp.int32), self.slots)[chosen]
        id_R = jnp.take_along_axis(ids.reshape(groups, images), owner, axis=1).reshape(-1)
        found = {k: take(by_slot(x)) for k, x in rows.items()}
        flat = {k: x.reshape(-1, *x.shape[2:]) for k, x in found.items() if k != "box"}
        return flat | {
            "box": found["box"],
            "owner": owner,
            "id": id_R,
            "there": take(there).reshape(-1),
            "left": there.sum().astype(jnp.float32) - take(there).sum().astype(jnp.float32),
        }

    def loss(self, model: xvlm.XVlm, batch, key):
        """The weighted sum of the losses over the kinds of batch; each loss and its accuracy by itself in metrics.

        Both kinds go through the text encoder and the cross-modal encoder together.
        """
        keys = (None,) * 5 if key is None else jax.random.split(key, 5)
        kinds = sorted(batch)
        texts = [batch[kind][name] for kind in kinds for name in ("text", "masked")[: 1 + bool(self.mlm)]]
        states = iter(part(model.states(interleave(texts), key=keys[0]), [len(x) for x in texts]))
        found = {}
        for kind, *own in zip(kinds, _split(keys[1], len(kinds)), _split(keys[2], len(kinds)), strict=True):
            seen = self._seen(model, batch[kind], next(states), next(states) if self.mlm else None, own[0])
            found[kind] = self._contrast(model, batch[kind], seen, own[1])
        metrics = {kind: values for kind, (_, values) in found.items()}
        if self._fuses:
            fused = self._fused(model, {kind: (batch[kind], seen) for kind, (seen, _) in found.items()}, keys[3:])
            metrics = {kind: metrics[kind] | fused[kind] for kind in kinds}
        total, named = jnp.zeros((), jnp.float32), {}
        for kind, values in metrics.items():
            total = total + sum(getattr(self, name) * values[name] for name in LOSSES if name in values)
            prefix = "" if self.kinds == (kind,) else f"{kind}_"
            named |= {prefix + name: value for name, value in values.items()}
        if self.itc:
            named["temperature"] = model.temperature()
        return total, {"loss": total} | named

    def _seen(self, model: xvlm.XVlm, rows: dict[str, jax.Array], states_RLD, masked_RLD, key) -> "Seen":
        """The images or regions of one kind of batch, beside its encoded texts."""
        if "owner" not in rows:
            return Seen(states_RLD, masked_RLD, model.encode(rows["image"], key=key))
        found = model.regions(rows["image"], rows["box"], rows["owner"], key=key)
        whole_RNC = rows_of(found.whole.tokens_BND, rows["owner"]) if self._boxes else None
        return Seen(states_RLD, masked_RLD, found.tokens_RND, found.inside_RN, whole_RNC)

    def _contrast(self, model: xvlm.XVlm, rows: dict[str, jax.Array], seen: "Seen", key) -> tuple["Seen", dict]:
        """What is seen with its hard negatives, and the metrics of one kind of batch so far."""
        there_R = rows["there"]
        count = there_R.sum().astype(jnp.float32)
        metrics = {"cut": (rows["cut"] & there_R).sum().astype(jnp.float32) / jnp.maximum(count, 1.0)}
        if "left" in rows:
            metrics |= {"filled": there_R.astype(jnp.float32).mean(), "left": rows["left"]}
        if not self.itc:
            return seen, metrics
        image_RE, text_RE = model.embed_tokens(seen.tokens_RNC), model.embed_states(seen.states_RLD)
        ids, scale = rows["id"] if self.same_image else None, 1 / model.temperature()
        loss, right = softmax_loss(image_RE, text_RE, scale, there_R, self.chunk, ids)
        metrics |= {"itc": loss, "itc_right": right / jnp.maximum(count, 1.0)}
        if self.itm:
            draw = jax.random.key(0) if key is None else key
            how = dict(among=self.among, chunk=self.chunk)
            seen = seen._replace(negatives=hard_negatives(image_RE, text_RE, scale, there_R, ids, draw, **how))
        return seen, metrics

    def _fused(self, model: xvlm.XVlm, batch: dict[str, tuple[dict, "Seen"]], keys) -> dict[str, dict[str, jax.Array]]:
        """Of each kind the losses and accuracies of what the cross-modal encoder makes of texts and images.

        Texts that look at one image stand together, so that its keys and values are made once for all of them.

        Args:
          model: the model.
          batch: of each kind its rows, prepared, and what they look at.
          keys: two, for dropout, or Nones.
        """
        own, others = [], []
        for rows, seen in batch.values():
            text, image = (seen.states_RLD, rows["text"]), (seen.tokens_RNC, seen.inside_RN)
            looking = []
            if self.itm:
                looking += [text, take_rows(text, seen.negatives.text)]
                others.append((*text, *take_rows(image, seen.negatives.image)))
            if self.mlm:
                looking.append((seen.masked_RLD, rows["masked"]))
            if looking:
                own.append((*(jnp.stack(x, axis=1) for x in zip(*looking, strict=True)), *image))
            if seen.whole_RNC is not None:
                others.append((*text, seen.whole_RNC, None))
        by_own = [list(jnp.moveaxis(x, 1, 0)) for x in model.fuse_together(own, keys[0])]
        by_others = iter(model.fuse_together(others, keys[1]))
        metrics = {}
        for (kind, (rows, seen)), of_own in zip(batch.items(), by_own or [[]] * len(batch), strict=True):
            values = metrics[kind] = {}
            there_R = rows["there"]
            if self.itm:
                weights_3R = jnp.stack(
                    [there_R, there_R & seen.negatives.image_there, there_R & seen.negatives.text_there]
                )
                logits_3R2 = model.itm(jnp.stack([of_own[0][:, 0], next(by_others)[:, 0], of_own[1][:, 0]]))
                values |= matching_loss(logits_3R2, weights_3R.astype(jnp.float32))
            if self.mlm:
                values |= self._words_loss(model, of_own[-1], rows)
            if seen.whole_RNC is not None:
                counted = there_R & (jnp.bool_(self.boxes_of_images) | ~rows["whole"])
                found_R4, true_R4 = model.box_of(next(by_others)), centres(rows["box"].reshape(-1, 4))
                l1, giou, iou = box_losses(found_R4, true_R4, counted.astype(jnp.float32))
                values |= {"l1": l1, "giou": giou, "iou": iou}
        return metrics

    def _words_loss(self, model: xvlm.XVlm, fused_RLD, rows):
        """Mean cross-entropy of the masked tokens, and the share of which the right one is the likeliest."""
        hidden_RMD = jnp.take_along_axis(fused_RLD, rows["places"][..., None], axis=1)
        hidden_RMD = model.text.word_states(hidden_RMD)
        asked_RM = (rows["words"] >= 0) & rows["there"][:, None]
        weights_RM = asked_RM.astype(jnp.float32) / jnp.maximum(asked_RM.sum().astype(jnp.float32), 1.0)
        labels = jnp.maximum(rows["words"], 0)
        output = model.text.output_layer()
        loss, _, right = vocabulary_loss(hidden_RMD, labels, weights_RM, *output, 0.0, self.chunk, True)
        return {"mlm": loss, "mlm_right": (right.astype(jnp.float32) * weights_RM).sum()}

    def flops(self, model_options: XVlmOptions) -> float:
        """Matmul FLOPs of training on one pair and its share of regions; similarities left out."""
        size, tokens = sizes.parse_size(model_options.text), model_options.image_tokens()
        kv = model_options.cross_layers * 2 * flops.dense(tokens, model_options.encoder_width, size.width)
        total = 0.0
        for kind, found in self.features().items():
            images = found.share
            texts = images * (self.group[1] / self.group[0] if kind == "regions" else 1.0)
            own, others = 2 * bool(self.itm) + bool(self.mlm), 1 * bool(self.itm)
            others += kind == "regions" and bool(self._boxes)
            fused = (own + others) * (model_options.fusion_flops() - kv) + (bool(own) + others) * kv
            words = model_options.words_flops(self.masks) if self.mlm else 0.0
            alone = (1 + bool(self.mlm)) * model_options.text_flops()
            total += images * model_options.encoder_flops() + texts * (alone + fused + words)
            if kind == "regions":
                total += texts * model_options.region_flops()
        return 3 * total


class Seen(NamedTuple):
    """What the rows of a kind of batch are to the cross-modal encoder.

    Attributes:
      states_RLD, masked_RLD: encoded texts, and those with tokens masked.
      tokens_RNC, inside_RN: their image's or region's tokens, and which are seen; None for all.
      whole_RNC: of a region its whole image's tokens, where its box is to be found.
      negatives: of matching.
    """

    states_RLD: jax.Array
    masked_RLD: jax.Array | None
    tokens_RNC: jax.Array
    inside_RN: jax.Array | None = None
    whole_RNC: jax.Array | None = None
    negatives: Negatives | None = None


def _split(key, count: int):
    return (None,) * count if key is None else jax.random.split(key, count)
