"""Texts that a decoder writes about images and clips: behind prompts, one each, several samples, or the n best.

Letters: B images, P tokens of a prompt, L tokens.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from capvl.decoding.beam import LOW
from capvl.decoding.generate import Decoding, generate, planned_length
from capvl.decoding.generate import n_best as best_texts
from capvl.decoding.names import Names
from capvl.errors import UserError, nearest
from capvl.inference.inputs import Images, Texts, as_list
from capvl.inference.loaded import Loaded
from capvl.models.abilities import Ability, abilities
from capvl.nn.padding import real
from capvl.values import convert

Written = list[str] | list[list[str]]


def begin(model, image_BRRC, prompt_BP) -> tuple[Any, jax.Array]:
    """The decoder's keys and values that texts are written behind, and the tokens that these begin with: the prompts,
    or none where the model reads questions by themselves (`Ability.ANSWERS`)."""
    if hasattr(model, "ask"):
        return model.ask(image_BRRC, prompt_BP), prompt_BP[:, :0]
    return model.decoder.image_kv(model.encode(image_BRRC)), prompt_BP


def write(model, image_BRRC, prompt_BP, length: int, eos: int, decoding: Decoding, **how) -> jax.Array:
    """Tokens (B, L) of a text of each image, or (B * samples, L); `how` and the others: see `generate`."""
    kv, prompt_BP = begin(model, image_BRRC, prompt_BP)
    return generate(model, kv, length, eos, decoding, prompt_BP=prompt_BP, **how)[0]


def prompt(options, objective, tokenizer, task: str, text: str = "") -> np.ndarray:
    """Tokens (P,) that begin what a model writes for a task.

    Args:
      options: of the model.
      objective: that it was trained with, which knows its tasks and their words; None where that isn't known: then
        the model tells its prompts.
      tokenizer: of its texts.
      task: "caption", "answer", "classify" or "read".
      text: a question; "" for none.

    Raises:
      UserError: the model wasn't trained for the task.
    """
    if objective is not None:
        return objective.prompt(options, tokenizer, task, text)
    return options.prompt(tokenizer, task, text)


def prompts(options, objective, tokenizer, task: str, texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Tokens (N, P) int32 of the prompts of questions, 0 behind each, and those questions that were too long for the
    model and cut at their end; arguments as for `prompt`."""
    rows, cut = [prompt(options, objective, tokenizer, task, text) for text in texts], []
    for text, row in zip(texts, rows, strict=True):
        whole = tokenizer(text, 4096) if text else row
        if (real(whole) & (whole != tokenizer.eos)).sum() > len(row):
            cut.append(text)
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32), cut


# What follows are methods of `capvl.inference.face.LoadedModel`, and what they share.


def caption(self: Loaded, images: Images, *, names: Texts | None = None, **writing) -> Written:
    """A caption of each image: greedy, by beam search, or sampled.

    Args:
      images: one or several.
      names: what is written is one of these; None for anything.
      writing: options of `capvl.decoding.generate.Decoding` (beams, length_penalty, rule, temperature, top_p,
        max_tokens …); seed: of what is sampled, 0 unless it is said; samples: 1 for a text of each image; k for a
        list of k texts of each, which are drawn one by one and need a temperature.
    """
    return _texts(self, self.pixels(images), _prompts(self, "caption", [""]), names, writing)


def answer(self: Loaded, images: Images, questions: Texts, *, names: Texts | None = None, **writing) -> Written:
    """Answers to a question about each image, or to one question for each.

    Args:
      images: one or several.
      questions: one, or as many as images.
      names: the answers that are allowed; None for any.
      writing: as for `caption`.

    Raises:
      UserError: the model wasn't trained to answer, or there are not as many questions as images.
    """
    return _texts(self, self.pixels(images), _prompts(self, "answer", as_list(questions)), names, writing)


def read(self: Loaded, images: Images, *, names: Texts | None = None, **writing) -> Written:
    """The words in each image; arguments as for `caption`."""
    return _texts(self, self.pixels(images), _prompts(self, "read", [""]), names, writing)


def caption_video(self: Loaded, videos: Any, *, names: Texts | None = None, **writing) -> Written:
    """A caption of each video, a path or bytes; arguments as for `caption`.

    Raises:
      UserError: the model reads no clips, or a video can't be read or has fewer frames than the model reads.
    """
    return _texts(self, self.clips(videos), _prompts(self, "caption", [""]), names, writing)


def answer_video(self: Loaded, videos: Any, questions: Texts, *, names: Texts | None = None, **writing) -> Written:
    """Answers to questions about videos; see `caption_video` and `answer`."""
    return _texts(self, self.clips(videos), _prompts(self, "answer", as_list(questions)), names, writing)


def n_best(
    self: Loaded, images: Any, question: str = "", *, names: Texts | None = None, **decoding
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
    pixels = self.clips(images) if Ability.CLIPS in abilities(self.options) else self.pixels(images)

    def function(model, image, prompt_BP, length, tree):
        kv, prompt_BP = begin(model, image, prompt_BP)
        found = best_texts(model, kv, length, self.tokenizer.eos, how, prompt_BP, names=tree)
        return found.tokens, found.scores

    rows = _behind(self, ("n_best",), function, pixels, _prompts(self, task, texts), names, how)
    return [
        [(self.tokenizer.decode(t), float(s)) for t, s in zip(*row, strict=True) if s > LOW / 2]
        for row in zip(*rows, strict=True)
    ]


def _prompts(model: Loaded, task: str, questions: list[str]) -> np.ndarray:
    """Tokens (N, P) of prompts; warns of questions that were cut."""
    model.need(Ability.DECODER, Ability.ANSWERS)
    rows, cut = prompts(model.options, model.objective, model.tokenizer, task, questions)
    for text in cut:
        warnings.warn(f"The question {text!r} is too long for the model and was cut at its end.", stacklevel=3)
    return rows


def _texts(model: Loaded, pixels: np.ndarray, prompt_NP: np.ndarray, names, options: dict[str, Any]) -> Written:
    """The text, or texts, that the decoder writes behind prompts, one prompt or as many as images."""
    draws = {name: options.pop(name, usual) for name, usual in (("seed", 0), ("samples", 1))}
    seed, samples = (convert(value, int, name) for name, value in draws.items())
    how, eos = _decoding(options, tuple(draws)), model.tokenizer.eos
    if samples < 1 or (samples > 1 and not how.temperature):
        raise UserError(f"samples={samples}: 1 or more are possible, and several of an image need a temperature.")

    # An image's samples hang on the seed and its number, not on what else is written with it.
    drawn = np.stack([np.full(len(pixels), seed % 2**32), np.arange(len(pixels))], axis=1).astype(np.uint32)

    def function(model, image, prompt_BP, length, tree, drawn):
        key = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(row[0]), row[1]))(drawn)
        rows = write(model, image, prompt_BP, length, eos, how, key=key, samples=samples, names=tree)
        return rows.reshape(-1, samples, length)

    found = _behind(model, ("write", samples), function, pixels, prompt_NP, names, how, drawn)
    texts = [[model.tokenizer.decode(t) for t in rows] for rows in found]
    return texts if samples > 1 else [rows[0] for rows in texts]


def _behind(model: Loaded, key: tuple, function, pixels: np.ndarray, prompt_NP, names, how: Decoding, *more) -> Any:
    """function(model, images, prompts, length, tree of names, *more) of images with one prompt or as many as images;
    `more` are further arrays with a row for each image."""
    if len(prompt_NP) not in (1, len(pixels)):
        raise UserError(f"There are {len(prompt_NP)} questions for {len(pixels)} images; give one, or one for each.")
    tree, allowed = None, None
    if names is not None:
        allowed = () if isinstance(names, list | tuple) and not names else tuple(as_list(names))
        tree = Names.of(allowed, model.tokenizer)
    length = planned_length(model.options, how, prompt_NP.shape[1], tree)
    prompt_BP = np.broadcast_to(prompt_NP, (len(pixels), prompt_NP.shape[1]))

    def call(model, rows):
        return function(model, *rows[:2], length, tree, *rows[2:])

    return model.run((*key, how, allowed, length), call, (pixels, prompt_BP, *more))


def _decoding(options: dict[str, Any], others: tuple[str, ...] = ()) -> Decoding:
    """How to write; `others` are options besides, for messages."""
    known = {f.name: f.type for f in dataclasses.fields(Decoding)}
    for name in options:
        if name not in known:
            raise UserError(f"Writing has no option {name!r}." + nearest(name, [*known, *others]))
    return Decoding(**{name: convert(value, known[name], name) for name, value in options.items()})
