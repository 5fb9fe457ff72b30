"""Does the model know which caption is right when the words are nearly the same?

A captioner picks the caption of higher likelihood, a matching head the one that it finds right, a two-tower model the
more similar one. Beside stands the blind control: the same model with a grey image, which shows what the words alone
give away.
"""

import dataclasses
import functools
import io

import numpy as np
from PIL import Image

from capvl.data.images.decode import BadImageError, decode
from capvl.data.randomness import Uniforms
from capvl.data.reading import lookup
from capvl.data.reading.rejected import Rejected
from capvl.errors import UserError, nearest
from capvl.evals import Context, check_limits, foils
from capvl.evals.encode import grey_image, image_transform, over_made, over_rows, tokenize
from capvl.inference.compiled import compiled
from capvl.inference.matching import cosines, matches
from capvl.inference.scoring import likelihoods
from capvl.models.abilities import Ability, abilities
from capvl.nn.padding import lengths
from capvl.terminal import say

GREY = ""
SCORES = {
    "likelihood": (Ability.DECODER, likelihoods),
    "match": (Ability.MATCHES, matches),
    "similarity": (Ability.TEXTS, cosines),
}
"""What a score of an image with a text may be: the ability that it needs, and its function."""
MADE = {"order": foils.of_captions, "scenes": foils.of_scenes}
"""Tests that are made of a prepared data set."""


def check_by(evaluator: str, by: str) -> None:
    """Raises UserError where `by` is neither of SCORES nor empty."""
    if by not in ("", *SCORES):
        raise UserError(f"{evaluator} by={by!r} is unknown." + nearest(by, SCORES))


def needed(by: str) -> tuple[Ability, ...]:
    """Abilities of which a model needs one."""
    return tuple(ability for name, (ability, _) in SCORES.items() if by in ("", name))


@dataclasses.dataclass(frozen=True)
class Compositionality:
    """Yields, for all questions and for each group: `GROUP/accuracy` and `GROUP/blind` over the questions whose
    image is there, `GROUP/count` of them, and `GROUP/blind_of_all` over all, with `GROUP/chance`.

    A question is answered when the right caption scores higher than every foil; a tie is not. For Winoground
    (arXiv 2204.03162) `text`, `image` and `group` are the paper's three scores.

    Attributes:
      format: "sugarcrepe", "aro", "negclip", "winoground" or "valse" (`capvl.evals.foils`); "order": the first
        captions of the data set `images`, with foils whose words are shuffled, or two of them swapped; or "scenes":
        attributes and relations of embedded scenes, `images`, with foils in which two of them are swapped.
      file: of the test, or a folder with its files; {data_dir} is where prepared data sets are; none for the last two.
      images: a folder of image files, or a prepared data set; "" for none: only the blind control is run. For tests
        that are made, "NAME:SPLIT"; the split is "val" where none is named.
      by: "likelihood", "match" or "similarity"; "" for the first of these that the model can do.
      mean: divide a likelihood by the number of tokens.
      plain: compare captions in lower case and without punctuation. In some files foils are spaced otherwise than
        captions (NegCLIP's "yak ." for "yak."), which gives them away.
      limit: questions of a group; 0 for all.
    """

    format: str = "sugarcrepe"
    file: str = ""
    images: str = ""
    by: str = ""
    mean: bool = False
    plain: bool = False
    limit: int = 0

    def __post_init__(self):
        check_limits(self, "limit")
        check_by("compositionality", self.by)
        if self.format in MADE and not self.images:
            raise UserError(f"compositionality: the format {self.format!r} needs a prepared data set as images.")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(needed(self.by), "compositionality")
        directory, where = context.data.directory(), context.path(self.images)
        if self.format in MADE:
            where = where if ":" in where else f"{where}:val"
            questions = MADE[self.format](where, directory, context.seed)
        else:
            left = Rejected()
            questions = foils.read(self.format, context.path(self.file), left)
            for reason, (count, places) in left.items():
                say(f"{count} rows of {self.file!r} are left out: {reason} (the first is {places[0]}).")
        questions = _limited(foils.plain(questions) if self.plain else questions, self.limit)
        images = lookup.open_images(where, directory) if self.images else lookup.Names()
        named, why = images.find(name for q in questions for name in q.images)
        if lookup.SEVERAL in why.values():
            several = [name for name, reason in why.items() if reason == lookup.SEVERAL]
            say(f"{len(several)} images are left out: several in {self.images!r} have that name, as {several[0]!r}.")
        present = [all(name in named for name in q.images) for q in questions]
        found = {
            key: named[name] if q.box is None else functools.partial(cut, named[name], q.box)
            for q, there in zip(questions, present, strict=True)
            for key, name in zip(q.keys, q.images, strict=True)
            if there
        }
        if self.images and not any(present):
            wanted = questions[0].images[0]
            raise UserError(f"None of the images of {self.file!r} is in {self.images!r}; the first is {wanted!r}.")
        scorer = PairScorer(context, by=self.by, mean=self.mean)

        def evaluate(params):
            pairs = [(GREY, c) for q in questions for c in q.captions]
            for question, there in zip(questions, present, strict=True):
                if there:
                    pairs += [(key, c) for key in question.keys for c in question.captions]
            scores = scorer(params, list(dict.fromkeys(pairs)), found)
            scored = [
                there and all((k, q.captions[0]) in scores for k in q.keys)
                for q, there in zip(questions, present, strict=True)
            ]
            yield from results(questions, scored, scores)

        return evaluate


def _limited(questions: list[foils.Foil], limit: int) -> list[foils.Foil]:
    kept, counts = [], {}
    for question in questions:
        counts[question.group] = counts.get(question.group, 0) + 1
        if not limit or counts[question.group] <= limit:
            kept.append(question)
    return kept


def results(questions: list[foils.Foil], present: list[bool], scores: dict[tuple[str, str], float]):
    """(name, value) pairs of `Compositionality` from the scores of (image, caption)."""
    groups = sorted({q.group for q in questions})
    for group in [*groups, "all"] if len(groups) > 1 else groups:
        mine = [(q, p) for q, p in zip(questions, present, strict=True) if group in (q.group, "all")]
        scored = [q for q, there in mine if there]
        yield f"{group}/count", float(len(scored))
        if scored:
            right = [answers(q, scores) for q in scored]
            names = ("text", "image", "group") if len(scored[0].images) == 2 else ("accuracy",)
            for i, name in enumerate(names):
                yield f"{group}/{name}", float(np.mean([r[i] for r in right]))
            yield f"{group}/blind", float(np.mean([blind_answer(q, scores) for q in scored]))
        yield f"{group}/blind_of_all", float(np.mean([blind_answer(q, scores) for q, _ in mine]))
        chance = [1 / len(q.captions) if len(q.images) == 1 else 0.25 for q, _ in mine]
        yield f"{group}/chance", float(np.mean(chance))


def answers(question: foils.Foil, scores: dict[tuple[str, str], float]) -> tuple[bool, ...]:
    """(right,), or Winoground's (text, image, group)."""
    names = question.keys
    if len(names) == 1:
        right, *wrong = (scores[names[0], c] for c in question.captions)
        return (all(right > w for w in wrong),)
    s = np.array([[scores[i, c] for c in question.captions] for i in names])
    text = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
    image = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
    return text, image, text and image


def cut(read, box: tuple[int, int, int, int]) -> bytes:
    """PNG of a part of an image as PIL's `crop` makes it, with which ARO's code cuts: black outside of the image.

    Args:
      read: a function that reads the encoded image.
      box: (left, top, right, bottom) in pixels.

    Raises:
      BadImageError: it can't be decoded, or the box is outside of it.
    """
    pixels = decode(read())
    height, width = pixels.shape[:2]
    outside = min(box[2], width) <= max(box[0], 0) or min(box[3], height) <= max(box[1], 0)
    if outside or (box[2] - box[0]) * (box[3] - box[1]) > 16 * width * height:
        raise BadImageError(f"the box {box} is outside of {width}x{height} pixels")
    part = Image.fromarray(pixels).crop(box)
    buffer = io.BytesIO()
    part.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def blind_answer(question: foils.Foil, scores: dict[tuple[str, str], float]) -> bool:
    """Whether the grey image leads to the right caption; for two images no single answer can be right for both."""
    right, *wrong = (scores[GREY, c] for c in question.captions)
    return len(question.images) == 1 and all(right > w for w in wrong)


class PairScorer:
    """Scores of (image name, text) pairs, several texts of an image at once."""

    TEXTS = 4

    def __init__(self, context: Context, *, by: str = "", mean: bool = False):
        """by, mean: see `Compositionality`."""
        self._context, self._mean = context, mean
        self.by = by or next(name for name, (ability, _) in SCORES.items() if ability in abilities(context.model))
        function = SCORES[self.by][1]
        self._score = compiled(context.blueprint, lambda model, rows: function(model, *rows))
        self._blind = compiled(
            context.blueprint, lambda model, text: function(model, grey_image(context.model), text[None])[0]
        )

    def __call__(self, params, pairs: list[tuple[str, str]], images) -> dict[tuple[str, str], float]:
        """The score of each pair; the image name GREY stands for the grey image. Pairs of images that can't be decoded
        have none; how many images these are is said.

        Args:
          params: of the model.
          pairs: different pairs.
          images: image name -> a function that reads the encoded image.
        """
        context = self._context
        texts = list(dict.fromkeys(caption for _, caption in pairs))
        tokens = dict(zip(texts, tokenize(context, texts), strict=True))
        scores: dict[tuple[str, str], float] = {}
        blind = [c for name, c in pairs if name == GREY]
        if blind:
            text = np.stack([tokens[c] for c in blind])
            out = over_rows(context, text, self._blind, params, "captions without an image")
            scores |= {(GREY, c): float(s) for c, s in zip(blind, out, strict=True)}
        grouped: dict[str, list[str]] = {}
        for name, caption in pairs:
            if name != GREY:
                grouped.setdefault(name, []).append(caption)
        rows = [
            (name, captions[i : i + self.TEXTS])
            for name, captions in grouped.items()
            for i in range(0, len(captions), self.TEXTS)
        ]
        scores |= self._of_images(params, rows, tokens, images)
        if self._mean and self.by == "likelihood":
            counts = {c: int(lengths(t)) for c, t in tokens.items()}
            scores = {(name, c): s / counts[c] for (name, c), s in scores.items()}
        return scores

    def _of_images(self, params, rows, tokens: dict[str, np.ndarray], images) -> dict[tuple[str, str], float]:
        """Scores of rows of an image's name and at most TEXTS captions."""
        crop = image_transform(self._context).crop

        @functools.lru_cache(maxsize=64)  # Rows of one image stand beside each other.
        def pixels(name: str) -> np.ndarray:
            try:
                return crop({"image": images[name]()}, Uniforms(0, 0))
            except OSError as e:
                raise BadImageError(str(e)) from e

        def make(n: int) -> dict[str, np.ndarray]:
            name, captions = rows[n]
            # What is left over repeats the first, so that no row is empty.
            texts = [*captions, *captions[:1] * (self.TEXTS - len(captions))]
            return {"image": pixels(name), "text": np.stack([tokens[c] for c in texts])}

        def scored(batch):
            return self._score(params, (batch["image"], batch["text"]))

        if not rows:
            return {}
        out, bad = over_made(self._context, make, len(rows), scored, "captions and images")
        if bad:
            names = dict.fromkeys(rows[n][0] for n in bad)
            first = f"{next(iter(names))!r}: {next(iter(bad.values()))}"
            say(f"{len(names)} images can't be used and are left out; the first is {first}.")
        kept = [row for n, row in enumerate(rows) if n not in bad]
        found = out if kept else []
        return {
            (name, caption): float(score)
            for (name, captions), row in zip(kept, found, strict=True)
            for caption, score in zip(captions, row, strict=False)
        }
