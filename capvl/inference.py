"""A trained model for notebooks and programs: images and texts in, arrays and texts out.

    model = capvl.load("runs/cappa_demo")
    model.caption("photo.jpg", beams=4)

Images are PIL images, uint8 arrays (H, W, 3) or (H, W), encoded bytes, paths, or lists of these.
Functions are compiled once for each power of two of rows, up to MOST; larger inputs go in parts.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capvl.convert.folder import Weights, read_model
from capvl.data import tokenizer as tokenizers
from capvl.data import video
from capvl.data.decode import BadImageError
from capvl.data.encoded import encoded
from capvl.data.randomness import Uniforms
from capvl.data.tasks import TASKS
from capvl.data.transforms import Crop
from capvl.decoding.beam import LOW
from capvl.decoding.generate import Decoding, generate, n_best, planned_length
from capvl.decoding.likelihood import log_likelihood_of_kv
from capvl.decoding.names import Names
from capvl.errors import UserError, nearest
from capvl.evals.names import read_templates
from capvl.evals.zeroshot import class_vectors
from capvl.evals.zeroshot_likelihood import Scorer
from capvl.models.git import GitOptions
from capvl.models.parameters import Blueprint
from capvl.nn.padding import real
from capvl.objectives.images import unit_range
from capvl.values import convert

MOST = 64
Images = Any
Texts = str | Sequence[str]
Written = list[str] | list[list[str]]


def load(
    path: str, *, step: int | None = None, tokenizer: str = "", dtype: str = "", trust: bool = False
) -> "LoadedModel":
    """A model from a run's workdir, a converted folder or a big_vision .npz.

    Args:
      path: where it is.
      step: of a workdir's checkpoint; None for the newest.
      tokenizer: path of a tokenizer, with the vocabulary of the model's own where that is there; "" for that.
      dtype: "float32" or "bfloat16" for activations; "" for the model's own.
      trust: import the code that a workdir names, of an objective of one's own; nothing of a folder is run else.

    Raises:
      UserError: missing, unreadable, none of these, or in need of code that is not trusted.
    """
    weights = read_model(os.fspath(path), step=step, trust=trust)
    if tokenizer:
        if weights.tokenizer:
            tokenizers.check_same_pieces(tokenizer, weights.tokenizer)
        weights = dataclasses.replace(weights, tokenizer=os.fspath(tokenizer))
    if dtype:
        weights = dataclasses.replace(weights, options=dataclasses.replace(weights.options, dtype=dtype))
    return LoadedModel(weights, os.fspath(path))


class LoadedModel:
    """A model with its parameters. Methods raise UserError where the model lacks the part that they need.

    Attributes:
      options: of the model.
      params: by path.
    """

    def __init__(self, weights: Weights, name: str):
        """name: for messages."""
        self.options, self.name = weights.options, name
        self.blueprint = Blueprint(weights.options)
        self.params = {k: jnp.asarray(v) for k, v in weights.params.items()}
        self._tokenizer_path, self._objective = weights.tokenizer, weights.objective
        sizes = {name: getattr(self.options, name, 0) for name in ("max_side", "frames")}
        kind = "aspect" if sizes["max_side"] else weights.crop
        how = dict(interpolation=weights.interpolation, fraction=weights.crop_fraction)
        self._crop = Crop(getattr(self.options, "res", 0), kind, **how, **sizes)
        self._compiled: dict[Any, Any] = {}

    def __repr__(self) -> str:
        count = sum(v.size for v in self.params.values())
        able = [a for a in ("an image tower", "a text tower", "a decoder") if self._has(a)]
        return f"LoadedModel({self.name!r}: {', '.join(able)}, {count / 1e6:.1f} M parameters)"

    @functools.cached_property
    def tokenizer(self):
        """The model's tokenizer."""
        if not self._tokenizer_path:
            raise UserError(f"The model {self.name!r} has no tokenizer; give one: capvl.load(…, tokenizer=PATH).")
        return tokenizers.load(self._tokenizer_path, self.options.reads_start)

    def embed(self, images: Images) -> np.ndarray:
        """Features (N, D) float32: a two-tower model's normalised embeddings, else the encoder's pooled features."""
        self._need("an image tower")

        def function(model, image):
            return model.embed_image(image) if hasattr(model, "embed_image") else model.features(image)

        return self._run("embed", function, self.pixels(images))

    def tokens(self, images: Images) -> np.ndarray:
        """Encoded image tokens (N, T, D) float32."""
        self._need("an image tower")
        return self._run("tokens", lambda m, image: m.encode(image).astype(jnp.float32), self.pixels(images))

    def embed_text(self, texts: Texts) -> np.ndarray:
        """Normalised embeddings (N, E) float32 of texts."""
        self._need("a text tower")
        return self._run("embed_text", lambda m, text: m.embed_text(text), self._tokens(_texts(texts)))

    def similarity(self, images: Images, texts: Texts) -> np.ndarray:
        """Cosines (N, M) of every image with every text."""
        return self.embed(images) @ self.embed_text(texts).T

    def caption(self, images: Images, *, names: Texts | None = None, **writing) -> Written:
        """A caption of each image: greedy, by beam search, or sampled.

        Args:
          images: one or several.
          names: what is written is one of these; None for anything.
          writing: options of `capvl.decoding.generate.Decoding` (beams, length_penalty, rule, temperature, top_p,
            max_tokens …); seed: of what is sampled, 0 unless it is said; samples: 1 for a text of each image; k for a
            list of k texts of each, which are drawn one by one and need a temperature.
        """
        return self._write(self.pixels(images), self._prompts("caption", [""]), names, writing)

    def answer(self, images: Images, questions: Texts, *, names: Texts | None = None, **writing) -> Written:
        """Answers to a question about each image, or to one question for each.

        Args:
          images: one or several.
          questions: one, or as many as images.
          names: the answers that are allowed; None for any.
          writing: as for `caption`.

        Raises:
          UserError: the model wasn't trained to answer, or there are not as many questions as images.
        """
        return self._write(self.pixels(images), self._prompts("answer", _texts(questions)), names, writing)

    def read(self, images: Images, *, names: Texts | None = None, **writing) -> Written:
        """The words in each image; arguments as for `caption`."""
        return self._write(self.pixels(images), self._prompts("read", [""]), names, writing)

    def caption_video(self, videos: Any, *, names: Texts | None = None, **writing) -> Written:
        """A caption of each video, a path or bytes; arguments as for `caption`.

        Raises:
          UserError: the model reads no clips, or a video can't be read or has fewer frames than the model reads.
        """
        return self._write(self.clips(videos), self._prompts("caption", [""]), names, writing)

    def answer_video(self, videos: Any, questions: Texts, *, names: Texts | None = None, **writing) -> Written:
        """Answers to questions about videos; see `caption_video` and `answer`."""
        return self._write(self.clips(videos), self._prompts("answer", _texts(questions)), names, writing)

    def n_best(
        self, images: Any, question: str = "", *, names: Texts | None = None, **decoding
    ) -> list[list[tuple[str, float]]]:
        """What a beam search finds for each image (or video, where the model reads clips), best first, each text with
        its score by the rule: captions, or answers to a question.

        Args:
          images: one or several.
          question: "" for captions.
          names: as for `caption`; there may then be fewer texts than beams.
          decoding: as for `caption`; beams is 4 unless it is said.

        Raises:
          UserError: fewer than two beams.
        """
        task, texts = ("answer", [question]) if question else ("caption", [""])
        how = _decoding({"beams": 4, **decoding})
        if how.beams < 2:
            raise UserError(f"n_best needs two beams or more, not {how.beams}.")
        seen = self.clips(images) if getattr(self.options, "frames", 0) else self.pixels(images)

        def function(model, image_kv, prompt, length, tree):
            found = n_best(model, image_kv, length, self.tokenizer.eos, how, prompt, names=tree)
            return found.tokens, found.scores

        rows = self._behind(("n_best",), function, seen, self._prompts(task, texts), names, how)
        return [
            [(self.tokenizer.decode(t), float(s)) for t, s in zip(*row, strict=True) if s > LOW / 2]
            for row in zip(*rows, strict=True)
        ]

    def _prompts(self, task: str, texts: list[str]) -> np.ndarray:
        """Tokens (N, P) of prompts."""
        self._need("a decoder")
        objective = self._objective or _usual_objective(self.options)
        rows = [objective.prompt(self.options, self.tokenizer, task, text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            whole = self.tokenizer(text, 4096) if text else row
            if (real(whole) & (whole != self.tokenizer.eos)).sum() > len(row):
                warnings.warn(f"The question {text!r} is too long for the model and was cut at its end.", stacklevel=3)
        width = max(map(len, rows))
        return np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)

    def _write(self, pixels: np.ndarray, prompts: np.ndarray, names, options: dict[str, Any]) -> Written:
        """The text, or texts, that the decoder writes behind prompts, one prompt or as many as images."""
        draws = {name: options.pop(name, usual) for name, usual in (("seed", 0), ("samples", 1))}
        seed, samples = (convert(value, int, name) for name, value in draws.items())
        how = _decoding(options, tuple(draws))
        if samples < 1 or (samples > 1 and not how.temperature):
            raise UserError(f"samples={samples}: 1 or more are possible, and several of an image need a temperature.")

        # An image's samples hang on the seed and its number, not on what else is written with it.
        drawn = np.stack([np.full(len(pixels), seed % 2**32), np.arange(len(pixels))], axis=1).astype(np.uint32)

        def function(model, image_kv, prompt, length, tree, drawn):
            key = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(row[0]), row[1]))(drawn)
            how_many = dict(key=key, samples=samples, names=tree)
            rows = generate(model, image_kv, length, self.tokenizer.eos, how, prompt_BP=prompt, **how_many)[0]
            return rows.reshape(-1, samples, length)

        found = self._behind(("write", samples), function, pixels, prompts, names, how, drawn)
        texts = [[self.tokenizer.decode(t) for t in rows] for rows in found]
        return texts if samples > 1 else [rows[0] for rows in texts]

    def _behind(
        self, name: tuple, function, pixels: np.ndarray, prompts: np.ndarray, names, how: Decoding, *more
    ) -> Any:
        """function(model, image_kv, prompts, length, tree of names, *more) of images with one prompt or as many as
        images; `more` are further arrays with a row for each image."""
        if len(prompts) not in (1, len(pixels)):
            raise UserError(f"There are {len(prompts)} questions for {len(pixels)} images; give one, or one for each.")
        tree, allowed = None, None
        if names is not None:
            allowed = tuple(_texts(names)) if len(names) else ()
            tree = Names.of(allowed, self.tokenizer)
        length = planned_length(self.options, how, prompts.shape[1], tree)
        prompts = np.broadcast_to(prompts, (len(pixels), prompts.shape[1]))

        def call(model, rows):
            return function(model, model.decoder.image_kv(model.encode(rows[0])), rows[1], length, tree, *rows[2:])

        return self._run((*name, how, allowed, length), call, (pixels, prompts, *more))

    def score(self, images: Images, texts: Texts) -> np.ndarray:
        """log p(text | image) in nats, (N,): text i for image i; or (N, M) of every image with every text where there
        are not as many texts as images. Longer texts than the model writes are cut, as in training."""
        self._need("a decoder")
        pixels, texts = self.pixels(images), _texts(texts)
        tokens = self._tokens(texts)
        if len(pixels) == len(texts):

            def function(model, batch):
                kv = model.decoder.image_kv(model.encode(batch[0]))
                return log_likelihood_of_kv(model, kv, batch[1])

            return self._run("score", function, (pixels, tokens))
        scorer = Scorer(tokens)
        return self._run(("score", tokens.tobytes()), scorer, pixels)

    def classify(
        self, images: Images, names: Sequence[str], *, templates: str | Sequence[str] = "", top: int = 1
    ) -> list[Any]:
        """The name of each image: of a two-tower model the nearest prompt ensemble, of a captioner the likeliest text.

        Args:
          images: one or several.
          names: classes, at least two.
          templates: of prompts, with {} for the name; "" for the package's own (two towers), or the bare name.
          top: 1 for names; k for lists of the k best (name, score).
        """
        names = _texts(names)
        if len(names) < 2 or len({n.casefold() for n in names}) < len(names):
            raise UserError("classify needs at least two names, each once.")
        if isinstance(templates, str):
            templates = read_templates(templates) if templates or self._has("a text tower") else ["{}"]
        if self._has("a text tower"):
            prompts = self.embed_text([t.format(n) for n in names for t in templates])
            scores = self.embed(images) @ class_vectors(prompts, len(templates)).T
        else:
            scores = np.logaddexp.reduce(
                [self._all_scores(images, [t.format(n) for n in names]) for t in templates]
            ) - np.log(len(templates))
        order = np.argsort(-scores, axis=1)
        if top == 1:
            return [names[i] for i in order[:, 0]]
        return [[(names[i], float(row[i])) for i in best[:top]] for row, best in zip(scores, order, strict=True)]

    def _all_scores(self, images: Images, texts: list[str]) -> np.ndarray:
        self._need("a decoder")
        tokens = self._tokens(texts, whole=True)
        return self._run(("score", tokens.tobytes()), Scorer(tokens), self.pixels(images))

    def pixels(self, images: Images) -> np.ndarray:
        """Images as the model sees them: (N, R, R, 3) uint8.

        Raises:
          UserError: there is none, or one can't be read.
        """
        self._need("an image tower")
        several = images if isinstance(images, list | tuple) else [images]
        if isinstance(images, np.ndarray | jax.Array) and images.ndim == 4:
            several = list(images)
        if not several:
            raise UserError("There are no images.")
        crop, rows = dataclasses.replace(self._crop, frames=0), []
        for number, image in enumerate(several):
            try:
                rows.append(crop({"image": encoded(image)}, Uniforms(0, 0)))
            except BadImageError as e:
                raise UserError(f"Image {number} can't be used: {e}") from e
        return np.stack(rows)

    def clips(self, videos: Any) -> np.ndarray:
        """Videos as the model sees them: (N, F, R, R, 3) uint8.

        Raises:
          UserError: the model reads no clips, or a video can't be read or is too short.
        """
        frames = getattr(self.options, "frames", 0)
        if not frames:
            raise UserError(f"The model {self.name!r} reads images, not clips.")
        several = videos if isinstance(videos, list | tuple) else [videos]
        if not several:
            raise UserError("There are no videos.")
        films = [[encoded(frame) for frame in video.read_frames(v, frames)] for v in several]
        return np.stack([self._crop({"frames": film}, Uniforms(0, 0)) for film in films])

    def _tokens(self, texts: list[str], *, whole: bool = False) -> np.ndarray:
        if whole:
            tokenizers.check_whole(self.tokenizer, texts, self.options.length)
        return np.stack([self.tokenizer(text, self.options.length) for text in texts])

    def _has(self, ability: str) -> bool:
        from capvl.evals import ABILITIES

        return ABILITIES[ability](self.options)

    def _need(self, ability: str) -> None:
        if not self._has(ability):
            raise UserError(f"The model {self.name!r} does not have {ability}, which this needs.")

    def _run(self, name: Any, function, rows: Any) -> Any:
        """function(model, rows), one array or several, compiled once for each bucket of rows; images come as uint8."""
        if name not in self._compiled:

            def call(params, rows):
                ready = jax.tree.map(lambda x: unit_range(x) if x.dtype == jnp.uint8 else x, rows)
                return function(self.blueprint.bind(params), ready)

            self._compiled[name] = jax.jit(call)
        leaves = jax.tree.leaves(rows)
        outputs = []
        for first in range(0, len(leaves[0]), MOST):
            part = jax.tree.map(lambda x, first=first: x[first : first + MOST], rows)
            count = len(jax.tree.leaves(part)[0])
            bucket = 1 << (count - 1).bit_length()
            padded = jax.tree.map(lambda x, n=bucket - count: np.concatenate([x, np.repeat(x[-1:], n, axis=0)]), part)
            found = jax.device_get(self._compiled[name](self.params, padded))
            outputs.append(jax.tree.map(lambda x, n=count: x[:n], found))
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)
        for leaf in jax.tree.leaves(joined):
            bad = int((~np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)).sum())
            if bad:
                raise UserError(
                    f"The model {self.name!r} gives values that are not finite for {bad} of {len(leaf)} rows."
                )
        return joined


def _usual_objective(options: Any) -> Any:
    """The objective whose prompts a converted model has."""
    from capvl.objectives.cappa import CapPa
    from capvl.objectives.git import Git

    return Git(tasks=TASKS, prompts=(("read", ""),)) if isinstance(options, GitOptions) else CapPa()


def _decoding(options: dict[str, Any], others: tuple[str, ...] = ()) -> Decoding:
    """How to write; `others` are options besides, for messages."""
    known = {f.name: f.type for f in dataclasses.fields(Decoding)}
    for name in options:
        if name not in known:
            raise UserError(f"Writing has no option {name!r}." + nearest(name, [*known, *others]))
    return Decoding(**{name: convert(value, known[name], name) for name, value in options.items()})


def _texts(texts: Texts) -> list[str]:
    several = [texts] if isinstance(texts, str) else list(texts)
    if not several or not all(isinstance(t, str) and t.strip() for t in several):
        raise UserError("Texts should be a text or a list of texts, none of them empty.")
    return several
