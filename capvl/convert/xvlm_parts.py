"""What an X-VLM, and models of its tasks, begin with: a BERT or RoBERTa, image encoders, an X-VLM with more heads."""

from typing import Any

import numpy as np

from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.parameters import Blueprint
from capvl.models.xvlm import TextOptions, XVlmOptions
from capvl.weights import Weights


def objective_of(options: XVlmOptions) -> dict[str, Any]:
    """The section of a recipe that evaluates an X-VLM: losses for the heads that it has."""
    losses = {"itc": ("itc",), "itm": ("itm",), "mlm": ("mlm",), "box": ("l1", "giou")}
    has = {loss: float(head in options.heads) for head, names in losses.items() for loss in names}
    return {"name": "xvlm", "kinds": ["pairs", "regions"] if "box" in options.heads else ["pairs"]} | has


def image_encoder(weights: Weights, options: Any, path: str) -> dict[str, np.ndarray]:
    """The image encoder of a model alone, whose texts' parameters are of another kind than the model's."""
    del options, path
    return {name: value for name, value in weights.params.items() if name.startswith("encoder/")}


def with_fewer_heads(weights: Weights, options: Any, path: str) -> dict[str, np.ndarray]:
    """An X-VLM's parameters without heads that the model doesn't have."""
    del path
    left = {head for head in weights.options.heads if head not in options.heads}
    names = {"itc": ("image_head/", "text_head/", "temp"), "itm": ("itm/",), "box": ("box/",)}
    names["mlm"] = ("text/transform", "text/word_bias")
    dropped = tuple(prefix for head in left for prefix in names[head])
    return {name: value for name, value in weights.params.items() if not dropped or not name.startswith(dropped)}


def text_of_bert(weights: Weights, options: TextOptions, path: str) -> dict[str, np.ndarray]:
    """Text and cross-modal encoder from a BERT or RoBERTa of ours: its lower layers, its upper ones as those that look
    at images, and its head for words; cross-attention is not in it (X-VLM, section 3.1).

    Of a BERT with as many lower layers and twice as many upper ones as the model has, every second upper layer is
    taken, beginning with the second: 13, 15, …, 23 of BERT-large for 12 lower and 6 upper layers (official code).

    Args:
      weights: the BERT.
      options: of the model.
      path: where the BERT is from, for messages.

    Raises:
      UserError: it is of another form than the model's texts' encoders.
    """
    bert, params, size = weights.options, weights.params, sizes.parse_size(options.text)
    there, cross, lower = sizes.parse_size(bert.text), options.cross_layers, size.depth - options.cross_layers
    of_depth = {size.depth: range(lower, size.depth), lower + 2 * cross: range(lower + 1, lower + 2 * cross, 2)}
    if there.depth not in of_depth:
        raise UserError(
            f"init_from: the BERT in {path!r} has {there.depth} layers; a model.text={options.text!r} with "
            f"model.cross_layers={cross} begins with one of {' or '.join(map(str, of_depth))}."
        )
    check_bert(options, bert, path)
    names = [name for name in params if not name.startswith(("blocks/", "pooler/", "next_sentence/"))]
    taken = {f"text/{name}": params[name] for name in names}
    taken["text/positions"] = params["positions"][: options.text_positions]
    for name in params:
        if name.startswith("blocks/"):
            taken[f"text/{name}"] = params[name][:lower]
            taken[f"text/cross/{name.removeprefix('blocks/')}"] = params[name][list(of_depth[there.depth])]
    known = Blueprint(options).shapes
    return {name: value for name, value in taken.items() if name in known}


def check_bert(options: Any, bert: Any, path: str) -> None:
    """Raises UserError where a BERT computes something else than the model's texts' encoders, or is smaller."""
    size, there = sizes.parse_size(options.text), sizes.parse_size(bert.text)
    named = f"w{there.width}d{size.depth}h{there.heads}m{there.mlp}"
    wanted = {
        "text": (options.text, options.text if sizes.parse_size(named) == size else named),
        "vocab": (options.vocab, bert.vocab),
        "text_types": (options.text_types, bert.types),
        "text_positions": (options.text_positions, min(options.text_positions, bert.length)),
        "text_pad": (options.text_pad, bert.pad),
        "first_position": (options.first_position, bert.first_position),
        "text_activation": (options.text_activation, bert.activation),
        "text_eps": (options.text_eps, bert.eps),
    }
    different = [f"model.{name}={there!r} (here {here!r})" for name, (here, there) in wanted.items() if here != there]
    if different:
        raise UserError(f"init_from: the BERT in {path!r} makes texts' encoders of {', '.join(different)}.")
