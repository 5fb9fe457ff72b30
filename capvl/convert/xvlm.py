"""X-VLM by the names of its official repository, in and out: pre-trained, and fine-tuned with heads of pre-training."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from capvl.convert import rules, swin, xvlm_names
from capvl.convert.hugging_face import CLIP_FORM, check_form
from capvl.convert.rules import Rule
from capvl.convert.xvlm_names import IMAGE
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.swin import SwinKind
from capvl.models.xvlm import HEADS, TextOptions, XVlmOptions

TEXT = "text_encoder."
_LOCAL_LAYERS = 4
"""Last layers in which the released ViTs encode regions alone."""
_HEADS = {"itm": "itm_head", "box": "bbox_head"}
_TEMPERATURE = rules.Layout(rules.SCALAR.read, lambda ours: [ours[0]])
_CLIP = CLIP_FORM | dict(activation="quick_gelu", eps=1e-5)
_SWIN = swin.FORM | dict(activation="gelu", eps=swin.EPS)
_DEIT = CLIP_FORM | dict(pre_norm=False, activation="gelu", eps=1e-6)
_BERT = dict(text_pad=0, first_position=0, text_activation="gelu", text_eps=1e-12)
_ROBERTA = _BERT | dict(text_pad=1, first_position=2, text_eps=1e-5, text_types=1)


def image_options(theirs: Mapping[str, np.ndarray], heads: int = 0, prefix: str = IMAGE) -> dict[str, Any]:
    """Options of the image encoder, from its shapes.

    Args:
      theirs: state dict, with its constants: a Swin's resolution is seen in its masks; without them it is that whose
        last stage is one window, as of all released ones.
      heads: of a ViT's attention; 0 for width / 64, which the released models have.
      prefix: of its names.

    Raises:
      UserError: there is none.
    """
    for form, kernel, positions, layers, mlp in (
        (_CLIP, "patch_embed.weight", "pos_embed.weight", "encoder.layers.", "mlp.fc1"),
        (_DEIT, "patch_embed.proj.weight", "pos_embed", "blocks.", "mlp.fc1"),
    ):
        if prefix + kernel in theirs and prefix + positions in theirs:
            patch = theirs[prefix + kernel].shape[-1]
            grid = round((theirs[prefix + positions].shape[-2] - 1) ** 0.5)
            size = xvlm_names.size(theirs, prefix + layers, mlp, heads)
            return form | dict(encoder=f"{size}/{patch}", res=grid * patch, pixels="clip", dtype="float32")
    if prefix + swin.ORIGINAL.stem in theirs:
        tower = {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}
        side = xvlm_names.swin_side(tower, tower[swin.ORIGINAL.stem].shape[-1], "")
        options, _ = swin.options_of(tower, swin.ORIGINAL, side, pixels="clip")
        names = ("encoder", "res", "window", "activation", "eps", "pixels", "dtype")
        return {name: getattr(options, name) for name in names}
    raise UserError(f"The weights have no image encoder under {prefix!r}, so they are not X-VLM's official ones.")


def text_options(theirs: Mapping[str, np.ndarray], heads: int = 0, model: str = TEXT) -> dict[str, Any]:
    """Options of a text model whose upper layers have cross-attention (`capvl.models.xvlm.TextOptions`).

    Args:
      theirs: state dict.
      heads: of its attention; 0 for width / 64.
      model: prefix of its names.

    Raises:
      UserError: there is none, or its layers are not of this form.
    """
    end = "embeddings.word_embeddings.weight"
    prefix = next((n.removesuffix(end) for n in theirs if n.startswith(model) and n.endswith(end)), None)
    if prefix is None:
        raise UserError(f"The weights have no {model}…{end}, so they are not X-VLM's official ones.")
    layers = f"{prefix}encoder.layer."
    depth = xvlm_names.depth(theirs, layers)
    crossing = [i for i in range(depth) if f"{layers}{i}.crossattention.self.query.weight" in theirs]
    if not crossing or crossing != list(range(crossing[0], depth)) or not crossing[0]:
        raise UserError(f"Layers {crossing} of {depth} under {layers!r} have cross-attention; X-VLM's upper ones have.")
    (vocab, _), types = theirs[prefix + end].shape, len(theirs[f"{prefix}embeddings.token_type_embeddings.weight"])
    rows = len(theirs[f"{prefix}embeddings.position_embeddings.weight"])
    form = _ROBERTA if is_roberta(theirs, prefix) else _BERT
    return form | dict(
        text=xvlm_names.size(theirs, layers, "intermediate.dense", heads),
        cross_layers=len(crossing),
        vocab=vocab,
        text_positions=rows,
        text_types=types,
        length=min(XVlmOptions.length, rows - form["first_position"]),
    )


def is_roberta(theirs: Mapping[str, np.ndarray], prefix: str) -> bool:
    """Whether a text model is a RoBERTa: its names say so, or it has one segment, where a BERT has two."""
    return prefix.endswith("roberta.") or len(theirs[f"{prefix}embeddings.token_type_embeddings.weight"]) == 1


def heads_of(options: Any) -> Callable[[str], int]:
    """Number of heads of attention by our parameter's name."""
    image, text = xvlm_names.image_heads(options), sizes.parse_size(options.text).heads
    return lambda name: image(name) if name.startswith("encoder/") else text


def table(options: XVlmOptions) -> list[Rule]:
    """Rules of an X-VLM."""
    words, roberta, cross = "mlm" in options.heads, bool(options.text_pad), options.cross_layers
    prefix = TEXT if not words else f"{TEXT}roberta." if roberta else f"{TEXT}bert."
    found = xvlm_names.image(options)
    found += xvlm_names.text("text/", prefix, sizes.parse_size(options.text).depth - cross, cross)
    if words:
        found += xvlm_names.words("text/", TEXT, roberta)
    if "itc" in options.heads:
        found += [*rules.dense("image_head", "vision_proj"), *rules.dense("text_head", "text_proj")]
        found.append(Rule("temp", ("temp",), _TEMPERATURE))
    for ours, theirs in _HEADS.items():
        found += xvlm_names.head(ours, theirs) if ours in options.heads else []
    return found


def read_official(theirs: Mapping[str, np.ndarray], *, image_heads: int = 0, text_heads: int = 0):
    """(options, parameters) of an official checkpoint, pre-trained or fine-tuned.

    Args:
      theirs: its state dict.
      image_heads, text_heads: of the attention of a ViT, and of the text and cross-modal encoders; 0 for width / 64.

    Raises:
      UserError: it is another model.
    """
    image, theirs = image_options(theirs, image_heads), xvlm_names.without_buffers(theirs)
    text = text_options(theirs, text_heads)
    named = {"itc": "vision_proj.weight", **{ours: f"{name}.0.weight" for ours, name in _HEADS.items()}}
    has = {head for head, name in named.items() if name in theirs}
    words = [name for name in theirs if name.startswith((f"{TEXT}cls.", f"{TEXT}lm_head."))]
    options = dict(heads=tuple(head for head in HEADS if head in has or (head == "mlm" and words)))
    if "itc" in has:
        options["projection"] = len(theirs["vision_proj.weight"])
    # Pre-training reads texts without their end, every fine-tuning with it.
    options = XVlmOptions(**image, **text, **options, reads_end=not words, local_layers=local_layers(image))
    if words:
        theirs = xvlm_names.untied(theirs, xvlm_names.ties(TEXT, bool(options.text_pad)))
    params = rules.read(theirs, table(options), heads_of(options), "model of X-VLM")
    return options, params | xvlm_names.fixed(options)


def local_layers(image: Mapping[str, Any]) -> int:
    """`local_layers` of an image encoder with these options."""
    if image.get("pool") != "cls":
        return 0
    return min(_LOCAL_LAYERS, sizes.parse(image["encoder"])[0].depth - 1)


def write_official(options: XVlmOptions, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict of an official checkpoint, with the constants that are in it.

    Raises:
      UserError: the model is not of a form that the official code has.
    """
    check_image(options)
    check_text(options)
    state = rules.write(xvlm_names.without_fixed(options, params), table(options), "model of X-VLM")
    words, roberta = "mlm" in options.heads, bool(options.text_pad)
    if words:
        state |= {copy: state[original] for copy, original in xvlm_names.ties(TEXT, roberta).items()}
    return state | xvlm_names.image_buffers(options) | xvlm_names.text_buffers(state)


def check_text(options: TextOptions) -> None:
    """Raises UserError where a text model is not of a form that the official code has."""
    form = _ROBERTA if options.text_pad else _BERT
    check_form(options, form, "model of X-VLM", kind=options.encoder_kind.called)


def check_image(options: Any) -> None:
    """Raises UserError where an image encoder is not of a form that the official code has."""
    kind, form = options.encoder_kind, _CLIP if options.pre_norm else _DEIT
    form = _SWIN if isinstance(kind, SwinKind) else form
    check_form(options, form | dict(pixels="clip"), "model of X-VLM", kind=kind.called)
