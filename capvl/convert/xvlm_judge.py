"""X-VLMs with a class head by the names of the official repository: NLVR2 and its text assignment; and what they begin
with where they are given a pre-trained X-VLM, or each other."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import bert, rules, xvlm, xvlm_names
from capvl.convert.rules import Rule
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.parameters import Blueprint
from capvl.models.xvlm_judge import JudgeOptions
from capvl.objectives.judge import ASSIGNED
from capvl.weights import Weights

_HEADS = {"mlp": "cls_head", "linear": "ta_head"}
_NLVR2 = ("False", "True")
Params = dict[str, np.ndarray]


def read_official(theirs: Mapping[str, np.ndarray], *, image_heads: int = 0, text_heads: int = 0):
    """(options, parameters) of an official NLVR2 or text assignment; arguments as `capvl.convert.xvlm.read_official`'s.

    Raises:
      UserError: it is another model.
    """
    image, theirs = xvlm.image_options(theirs, image_heads), xvlm_names.without_buffers(theirs)
    text = xvlm.text_options(theirs, text_heads)
    size, doubled = sizes.parse_size(text["text"]), text["cross_layers"]
    if doubled % 2:
        raise UserError(f"The weights have {doubled} layers with cross-attention, and NLVR2's go by twos.")
    cross = doubled // 2
    text |= dict(text=f"w{size.width}d{size.depth - cross}h{size.heads}m{size.mlp}", cross_layers=cross)
    head = "linear" if "ta_head.weight" in theirs else "mlp"
    classes = ASSIGNED if head == "linear" else _NLVR2
    projection = len(theirs["vision_proj.weight"]) if "vision_proj.weight" in theirs else 0
    options = JudgeOptions(**image, **text, images=2, classes=classes, head=head, projection=projection)
    theirs = xvlm_names.untied(theirs, _ties(options))
    params = rules.read(theirs, table(options), xvlm.heads_of(options), "model of NLVR2")
    return options, params | xvlm_names.fixed(options)


def _lower(options: JudgeOptions) -> int:
    return sizes.parse_size(options.text).depth - options.cross_layers


def _ties(options: JudgeOptions) -> dict[str, str]:
    """Keys and values of the second layer of each two, which are the first's."""
    layer = f"{xvlm.TEXT}encoder.layer.{{}}.crossattention.self.{{}}.{{}}"
    firsts = range(_lower(options), _lower(options) + 2 * options.cross_layers, 2)
    parts = [(part, leaf) for part in ("key", "value") for leaf in ("weight", "bias")]
    return {layer.format(i + 1, *part): layer.format(i, *part) for i in firsts for part in parts}


def table(options: JudgeOptions) -> list[Rule]:
    """Rules of a model of two images."""
    lower = _lower(options)
    last = lower + 2 * options.cross_layers
    first, second = (
        xvlm_names.fusion_layers("text/cross", xvlm.TEXT, range(lower + i, last, 2), f"/{name}")
        for i, name in enumerate(("first", "second"))
    )
    below = bert.layer("text/blocks/{i}", f"{xvlm.TEXT}encoder.layer.{{i}}")
    found = [
        *xvlm_names.image(options),
        *bert.embeddings("text/", f"{xvlm.TEXT}embeddings."),
        *rules.of_layers(below, range(lower)),
        *first,
        *(rule for rule in second if "/cross_kv/" not in rule.ours),
    ]
    name = _HEADS[options.head]
    found += xvlm_names.head("head", name) if options.head == "mlp" else rules.dense("head", name)
    return found + rules.dense("image_head", "vision_proj") if options.projection else found


def write_official(options: JudgeOptions, params: Mapping[str, np.ndarray]) -> Params:
    """The state dict of an official NLVR2 or text assignment.

    Raises:
      UserError: the model is not of a form that the official code has.
    """
    classes = len(ASSIGNED if options.head == "linear" else _NLVR2)
    if options.images != 2 or len(options.classes) != classes:
        raise UserError(
            f"The official X-VLM has class heads for 2 images and {classes} classes with head={options.head!r}; this "
            f"model has {options.images} and {len(options.classes)}."
        )
    xvlm.check_image(options)
    xvlm.check_text(options)
    state = rules.write(xvlm_names.without_fixed(options, params), table(options), "model of NLVR2")
    state |= {copy: state[original] for copy, original in _ties(options).items()}
    return state | xvlm_names.image_buffers(options) | xvlm_names.text_buffers(state)


def of_xvlm(weights: Weights, options: JudgeOptions, path: str) -> Params:
    """What a model with a class head begins with where it is given an X-VLM: its encoders, each cross-modal layer twice
    for two images, with one projection of keys and values; the class head is new (X-VLM, section 4.2)."""
    del path
    return _known(weights.params, weights.params, options)


def of_judge(weights: Weights, options: JudgeOptions, path: str) -> Params:
    """What NLVR2 begins with where it is given text assignment: all but a head for other classes."""
    del path
    same = (options.head, len(options.classes)) == (weights.options.head, len(weights.options.classes))
    kept = {name: value for name, value in weights.params.items() if same or not name.startswith("head/")}
    return _known(kept, weights.params, options)


def _known(kept: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray], options: Any) -> Params:
    """What the model has of some parameters; layers that look at one image are copied where it has them twice."""
    out, known = dict(kept), Blueprint(options).shapes
    if options.images == 2 and "text/cross/norm1/scale" in params:
        for name in [n for n in kept if n.startswith("text/cross/")]:
            leaf, value = name.removeprefix("text/cross/"), out.pop(name)
            out |= {f"text/cross/{part}/{leaf}": value for part in ("first", "second")}
    return {name: value for name, value in out.items() if name in known}
