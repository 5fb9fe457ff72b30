"""X-VLMs that write, by the names of the official repository: its captioner, and its model of questions and answers;
and what they begin with where they are given a pre-trained X-VLM."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import bert, rules, xvlm, xvlm_names
from capvl.convert.rules import Rule
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.xvlm_answers import XVlmAnswersOptions
from capvl.models.xvlm_captioner import XVlmCaptionerOptions
from capvl.weights import Weights

WORDS = "text_decoder."
Params = dict[str, np.ndarray]


def read_captioner(theirs: Mapping[str, np.ndarray], *, image_heads: int = 0, text_heads: int = 0):
    """(options, parameters) of an official captioner; arguments as of `capvl.convert.xvlm.read_official`.

    Raises:
      UserError: it is another model.
    """
    image, theirs = xvlm.image_options(theirs, image_heads), xvlm_names.without_buffers(theirs)
    text = xvlm.text_options(theirs, text_heads, WORDS)
    start, _ = ends(text)
    options = XVlmCaptionerOptions(**image, **text, start=start)
    theirs = xvlm_names.untied(theirs, xvlm_names.ties(WORDS, bool(options.text_pad)))
    params = rules.read(theirs, captioner_table(options), xvlm.heads_of(options), "model of X-VLM")
    return options, params | xvlm_names.fixed(options)


def ends(text: Mapping[str, Any]) -> tuple[int, int]:
    """Ids before and behind a text, of a model with these options: those of the released vocabularies, BERT's [CLS] and
    [SEP] or RoBERTa's; the last two of a vocabulary that is smaller."""
    start, end = (0, 2) if text["text_pad"] else (101, 102)
    return (start, end) if end < text["vocab"] else (text["vocab"] - 2, text["vocab"] - 1)


def captioner_table(options: XVlmCaptionerOptions) -> list[Rule]:
    """Rules of a captioner."""
    roberta, depth = bool(options.text_pad), sizes.parse_size(options.text).depth
    prefix = f"{WORDS}{'roberta' if roberta else 'bert'}."
    return [
        *xvlm_names.image(options),
        *xvlm_names.text("text/", prefix, depth - options.cross_layers, options.cross_layers),
        *xvlm_names.words("text/", WORDS, roberta),
    ]


def read_answers(theirs: Mapping[str, np.ndarray], *, image_heads: int = 0, text_heads: int = 0):
    """(options, parameters) of an official model of questions and answers.

    Raises:
      UserError: it is another model.
    """
    image, theirs = xvlm.image_options(theirs, image_heads), xvlm_names.without_buffers(theirs)
    text = xvlm.text_options(theirs, text_heads)
    start, end = ends(text)
    named = dict(
        length=min(XVlmAnswersOptions.length, text["length"]),
        question_length=text["length"],
        answer_layers=xvlm_names.depth(theirs, f"{WORDS}bert.encoder.layer."),
    )
    options = XVlmAnswersOptions(**image, **text | named, start=start, end=end)
    theirs = xvlm_names.untied(theirs, xvlm_names.ties(WORDS, False))
    params = rules.read(theirs, answers_table(options), xvlm.heads_of(options), "model of X-VLM")
    return options, params | xvlm_names.fixed(options)


def answers_table(options: XVlmAnswersOptions) -> list[Rule]:
    """Rules of a model of questions and answers, which the official code has with a BERT only."""
    depth = sizes.parse_size(options.text).depth
    return [
        *xvlm_names.image(options),
        *xvlm_names.text("text/", xvlm.TEXT, depth - options.cross_layers, options.cross_layers),
        *bert.embeddings("answers/", f"{WORDS}bert.embeddings."),
        *xvlm_names.fusion_layers("answers/cross", f"{WORDS}bert.", range(options.answer_layers)),
        *xvlm_names.words("answers/", WORDS, False),
    ]


def write_official(options: Any, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict of an official captioner, or model of questions and answers.

    Raises:
      UserError: the model is not of a form that the official code has.
    """
    captioner = isinstance(options, XVlmCaptionerOptions)
    if not captioner and options.text_pad:
        raise UserError("The official X-VLM answers questions with a BERT only.")
    xvlm.check_image(options)
    xvlm.check_text(options)
    table = captioner_table(options) if captioner else answers_table(options)
    state = rules.write(xvlm_names.without_fixed(options, params), table, "model of X-VLM")
    state |= {copy: state[original] for copy, original in xvlm_names.ties(WORDS, bool(options.text_pad)).items()}
    return state | xvlm_names.image_buffers(options) | xvlm_names.text_buffers(state)


def captioner_of_xvlm(weights: Weights, options: XVlmCaptionerOptions, path: str) -> Params:
    """What a captioner begins with where it is given an X-VLM: its encoders and its table, without heads."""
    del path
    return {k: v for k, v in weights.params.items() if k.startswith(("encoder/", "text/"))}


def answers_of_xvlm(weights: Weights, options: XVlmAnswersOptions, path: str) -> Params:
    """What a model of questions and answers begins with where it is given an X-VLM: the decoder is a copy of the
    cross-modal encoder's layers, as in the official code. Keys and values of another width are not among it.

    Raises:
      UserError: the decoder has more layers than the cross-modal encoder, or there is no head for words.
    """
    params, cross = weights.params, weights.options.cross_layers
    if options.answer_layers > cross:
        raise UserError(
            f"init_from: the X-VLM in {path!r} has {cross} cross-modal layers, fewer than "
            f"model.answer_layers={options.answer_layers}."
        )
    if "text/word_bias" not in params:
        raise UserError(f"init_from: the X-VLM in {path!r} has no head for words, which answers are written with.")
    text = {k.removeprefix("text/"): v for k, v in params.items() if k.startswith("text/")}
    heads = ("transform", "word_bias")
    out = {k: v for k, v in params.items() if k.startswith("encoder/")}
    out |= {f"text/{k}": v for k, v in text.items() if not k.startswith(heads)}
    same = weights.options.encoder_width == sizes.parse_size(options.text).width
    for name, value in text.items():
        if name.startswith("blocks/") or (name.startswith("cross/cross_kv/") and not same):
            continue
        out[f"answers/{name}"] = value[: options.answer_layers] if name.startswith("cross/") else value
    return out
