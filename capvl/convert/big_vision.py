"""big_vision's CapPa, two-tower and ViT parameters, read and written without loss.

Both of its layouts are known: unrolled (`encoderblock_0`, `EncDecBlock0`) and scanned
(`encoderblock` stacked on axis 0, `EncDecBlock` stacked on axis 1).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert.assembling import assemble
from capvl.convert.files import Source, Target, read_npz, write_npz
from capvl.convert.hugging_face import check_form
from capvl.convert.pixels import Pixels
from capvl.convert.shapes import options_of
from capvl.errors import UserError
from capvl.models.abilities import Ability, abilities
from capvl.weights import Weights

# Ours -> theirs; a tuple is fused along the axis after the input width.
_ENCODER_DIRECT = {
    "stem/kernel": "embedding/kernel",
    "stem/bias": "embedding/bias",
    "norm/scale": "Transformer/encoder_norm/scale",
    "norm/bias": "Transformer/encoder_norm/bias",
}
_ENCODER_WITH_BATCH_AXIS = {"positions": "pos_embedding", "cls": "cls", "map/probe": "MAPHead_0/probe"}
_DECODER_DIRECT = {
    "decoder/tokens": "decoder/EmbedTargets/embedding",
    "decoder/norm/scale": "decoder/LayerNorm/scale",
    "decoder/norm/bias": "decoder/LayerNorm/bias",
    "decoder/logits/kernel": "decoder/LogitsDense/kernel",
    "decoder/logits/bias": "decoder/LogitsDense/bias",
}
_TWO_TOWERS = {
    "image_head/kernel": "img/head/kernel",
    "image_head/bias": "img/head/bias",
    "text/tokens": "txt/Embed_0/embedding",
    "text/norm/scale": "txt/Encoder_0/encoder_norm/scale",
    "text/norm/bias": "txt/Encoder_0/encoder_norm/bias",
    "text/head/kernel": "txt/head/kernel",
    "text/head/bias": "txt/head/bias",
    "log_scale": "t",
    "bias": "b",
}
_ATTENTION = "MultiHeadDotProductAttention_0"
_ENCODER_LAYER = {
    "norm1": ("LayerNorm_0",),
    "norm2": ("LayerNorm_1",),
    "mlp/up": ("MlpBlock_0/Dense_0",),
    "mlp/down": ("MlpBlock_0/Dense_1",),
    "attn/qkv": tuple(f"{_ATTENTION}/{part}" for part in ("query", "key", "value")),
    "attn/out": (f"{_ATTENTION}/out",),
}
_DECODER_LAYER = {
    "norm1": ("LayerNorm1",),
    "norm2": ("LayerNorm2",),
    "norm3": ("LayerNorm3",),
    "mlp/up": ("MLP/Dense_0",),
    "mlp/down": ("MLP/Dense_1",),
    "self_attn/qkv": tuple(f"SelfAttn/{part}" for part in ("query", "key", "value")),
    "self_attn/out": ("SelfAttn/out",),
    "cross_attn/q": ("CrossAttn/query",),
    "cross_attn/out": ("CrossAttn/out",),
}
_CROSS_KV = ("CrossAttn/key", "CrossAttn/value")
_MAP = {
    "kv": tuple(f"{_ATTENTION}/{part}" for part in ("key", "value")),
    "attn/q": (f"{_ATTENTION}/query",),
    "attn/out": (f"{_ATTENTION}/out",),
    "norm": ("LayerNorm_0",),
    "mlp/up": ("MlpBlock_0/Dense_0",),
    "mlp/down": ("MlpBlock_0/Dense_1",),
}
_FUSED = ("attn/qkv", "self_attn/qkv", "cross_attn/q", "kv", "attn/q")


def from_big_vision(theirs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Ours from a flat dict of big_vision's parameters (a leading `params/` is dropped).

    CapPa models, two towers (`img/`, `txt/`, `t`, `b`) and plain ViTs (`encoder/…` of ours) are known.

    Raises:
      UserError: parameters are missing, or some are not known.
    """
    theirs = {k.removeprefix("params/"): np.asarray(v) for k, v in theirs.items()}
    if any(k.startswith("txt/") for k in theirs):
        return _from_two_towers(theirs)
    if "embedding/kernel" in theirs:
        take = Taker(theirs, "ViT")
        ours = _take_encoder(take, "")
        take.optional("head/kernel"), take.optional("head/bias")  # Of the classes it was trained on.
        take.finish()
        return ours
    take = Taker(_unstack(theirs), "CapPa model")
    ours = _take_encoder(take, "encoder/")
    ours |= {name: take(key) for name, key in _DECODER_DIRECT.items()}
    ours["decoder/positions"] = take("pos_embedding_decoder")[0]
    depth = _take_layers(ours, take, "decoder/blocks", "decoder/EncDecBlock", _DECODER_LAYER)
    ours["decoder/cross_kv"] = np.stack(
        [np.stack([take(f"decoder/EncDecBlock{i}/{part}/kernel") for part in _CROSS_KV], 1) for i in range(depth)]
    )
    take.finish()
    return ours


def _from_two_towers(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    take = Taker(_unstack(theirs), "two-tower model")
    ours = _take_encoder(take, "img/")
    for name, key in _TWO_TOWERS.items():
        if key in take.left:
            ours[name] = take(key)
    ours["text/positions"] = take("txt/pos_embedding")[0]
    ours.setdefault("bias", np.zeros(1, np.float32))  # A model that was trained with the softmax loss has none.
    _take_layers(ours, take, "text/blocks", "txt/Encoder_0/encoderblock_", _ENCODER_LAYER)
    if "txt/MAPHead_0/probe" in take.left:
        ours["text/map/probe"] = take("txt/MAPHead_0/probe")[0]
        _take_map(ours, take, "text/map", "txt/MAPHead_0")
    take.finish()
    return ours


class Taker:
    """Takes parameters by name and knows which are left."""

    def __init__(self, theirs: Mapping[str, np.ndarray], what: str):
        self.left, self._what = dict(theirs), what

    def __call__(self, key: str) -> np.ndarray:
        if key not in self.left:
            raise UserError(f"The parameters lack {key!r}, so they are not a whole big_vision {self._what}.")
        return self.left.pop(key)

    def optional(self, key: str) -> np.ndarray | None:
        """The parameter, or None."""
        return self.left.pop(key, None)

    def finish(self) -> None:
        """Raises UserError where something is left."""
        if self.left:
            raise UserError(
                f"The parameters have {len(self.left)} leaves that a big_vision {self._what} does not have: "
                f"{', '.join(sorted(self.left)[:5])}."
            )


def _take_encoder(take: "Taker", prefix: str) -> dict[str, np.ndarray]:
    """The image tower below `prefix`."""
    ours = {f"encoder/{name}": take(prefix + key) for name, key in _ENCODER_DIRECT.items()}
    for name, key in _ENCODER_WITH_BATCH_AXIS.items():
        if prefix + key in take.left:
            ours[f"encoder/{name}"] = take(prefix + key)[0]
    _take_layers(ours, take, "encoder/blocks", f"{prefix}Transformer/encoderblock_", _ENCODER_LAYER)
    if "encoder/map/probe" in ours:
        _take_map(ours, take, "encoder/map", f"{prefix}MAPHead_0")
    return ours


def _take_map(ours, take, prefix: str, their_prefix: str) -> None:
    for name, keys in _MAP.items():
        for leaf in _leaves(take.left, f"{their_prefix}/{keys[0]}"):
            ours[f"{prefix}/{name}/{leaf}"] = _fuse(name, leaf, [take(f"{their_prefix}/{k}/{leaf}") for k in keys])


def to_big_vision(ours: Mapping[str, Any], *, scan: bool = False) -> dict[str, np.ndarray]:
    """big_vision's flat names (without `params/`) for our parameters, in either of its layouts.

    A model with a text tower becomes its two towers, an encoder alone its ViT, else its CapPa model.

    Raises:
      UserError: the model has parts that big_vision's doesn't have.
    """
    ours = {k: np.asarray(v, np.float32) for k, v in ours.items()}
    foreign = "encoder/(registers|pre_norm|stem/conv|blocks/scale)|decoder/(visual|embedding_norm)|frames"
    unknown = [k for k in ours if re.match(foreign, k)]
    if unknown or ("text/tokens" in ours and "decoder/tokens" in ours):
        raise UserError(f"big_vision has no model with {unknown[0] if unknown else 'a text tower and a decoder'}.")
    if "text/tokens" in ours:
        theirs = _give_encoder(ours, "img/")
        theirs |= {key: ours[name] for name, key in _TWO_TOWERS.items() if name in ours}
        theirs["txt/pos_embedding"] = ours["text/positions"][None]
        _give_layers(theirs, ours, "text/blocks", "txt/Encoder_0/encoderblock_", _ENCODER_LAYER)
        if "text/map/probe" in ours:
            theirs["txt/MAPHead_0/probe"] = ours["text/map/probe"][None]
            _give_map(theirs, ours, "text/map", "txt/MAPHead_0")
    elif "decoder/tokens" not in ours:
        theirs = _give_encoder(ours, "")
    else:
        theirs = _give_encoder(ours, "encoder/")
        theirs |= {key: ours[name] for name, key in _DECODER_DIRECT.items()}
        theirs["pos_embedding_decoder"] = ours["decoder/positions"][None]
        _give_layers(theirs, ours, "decoder/blocks", "decoder/EncDecBlock", _DECODER_LAYER)
        for i, kernel in enumerate(ours["decoder/cross_kv"]):
            for part, name in enumerate(_CROSS_KV):
                theirs[f"decoder/EncDecBlock{i}/{name}/kernel"] = kernel[:, part]
    return _restack(theirs) if scan else theirs


def _give_encoder(ours: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    theirs = {prefix + key: ours[f"encoder/{name}"] for name, key in _ENCODER_DIRECT.items()}
    for name, key in _ENCODER_WITH_BATCH_AXIS.items():
        if f"encoder/{name}" in ours:
            theirs[prefix + key] = ours[f"encoder/{name}"][None]
    _give_layers(theirs, ours, "encoder/blocks", f"{prefix}Transformer/encoderblock_", _ENCODER_LAYER)
    _give_map(theirs, ours, "encoder/map", f"{prefix}MAPHead_0")
    return theirs


def _give_map(theirs, ours, prefix: str, their_prefix: str) -> None:
    for name, keys in _MAP.items():
        for leaf in _leaves(ours, f"{prefix}/{name}"):
            parts = _unfuse(name, leaf, ours[f"{prefix}/{name}/{leaf}"], len(keys))
            theirs |= {f"{their_prefix}/{k}/{leaf}": p for k, p in zip(keys, parts, strict=True)}


def _leaves(tree: Mapping, prefix: str) -> list[str]:
    return [leaf for leaf in ("kernel", "scale", "bias") if f"{prefix}/{leaf}" in tree]


def _fuse(name: str, leaf: str, parts: list[np.ndarray]) -> np.ndarray:
    if name not in _FUSED:
        return parts[0]
    return np.stack(parts, axis=1 if leaf == "kernel" else 0)


def _unfuse(name: str, leaf: str, value: np.ndarray, parts: int) -> list[np.ndarray]:
    if name not in _FUSED:
        return [value]
    axis = 1 if leaf == "kernel" else 0
    return [np.take(value, i, axis=axis) for i in range(parts)]


def _take_layers(ours, take, prefix, their_prefix, table) -> int:
    numbers = {int(m[1]) for k in take.left if (m := re.match(re.escape(their_prefix) + r"(\d+)/", k))}
    depth = len(numbers)
    for name, keys in table.items():
        for leaf in _leaves(take.left, f"{their_prefix}0/{keys[0]}"):
            layers = [
                _fuse(name, leaf, [take(f"{their_prefix}{i}/{key}/{leaf}") for key in keys]) for i in range(depth)
            ]
            ours[f"{prefix}/{name}/{leaf}"] = np.stack(layers)
    return depth


def _give_layers(theirs, ours, prefix, their_prefix, table) -> None:
    for name, keys in table.items():
        for leaf in _leaves(ours, f"{prefix}/{name}"):
            for i, layer in enumerate(ours[f"{prefix}/{name}/{leaf}"]):
                parts = _unfuse(name, leaf, layer, len(keys))
                theirs |= {f"{their_prefix}{i}/{k}/{leaf}": p for k, p in zip(keys, parts, strict=True)}


# What comes before a layer's number, the scanned name without it, and the axis that it is stacked on.
_NUMBERED = (
    (r"(.*encoderblock)_(\d+)(/.*)", r"(.*encoderblock)(/.*)", "{}_{}{}", 0),
    (r"(.*EncDecBlock)(\d+)(/.*)", r"(.*EncDecBlock)(/.*)", "{}{}{}", 1),
)


def _unstack(theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The unrolled layout of either."""
    out = {}
    for key, value in theirs.items():
        for _, scanned, name, axis in _NUMBERED:
            if match := re.fullmatch(scanned, key):
                out |= {name.format(match[1], i, match[2]): x for i, x in enumerate(np.moveaxis(value, axis, 0))}
                break
        else:
            out[key] = value
    return out


def _restack(theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The scanned layout of the unrolled one."""
    out, groups = {}, {}
    for key, value in theirs.items():
        for numbered, _, _, axis in _NUMBERED:
            if match := re.fullmatch(numbered, key):
                groups.setdefault((match[1] + match[3], axis), {})[int(match[2])] = value
                break
        else:
            out[key] = value
    return out | {k: np.stack([x[i] for i in range(len(x))], axis=axis) for (k, axis), x in groups.items()}


def read(source: Source) -> Weights:
    """A captioner, two towers or an encoder of an .npz; images are squashed, as big_vision evaluates them."""
    arrays = read_npz(source.path)
    params = from_big_vision({k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in arrays.items()})
    options = options_of(params)
    pixels = Pixels(options.pixels, crop="squash", interpolation="fast")
    return assemble(source, options, params, resize="big_vision", pixels=pixels)


def write(weights: Weights, target: Target) -> None:
    """Writes an .npz.

    Raises:
      UserError: big_vision has no such model, or the file can't be written.
    """
    options = weights.options
    if Ability.IMAGES not in abilities(options) or getattr(options, "text_norm", "pre") != "pre":
        raise UserError("big_vision has no form of this BERT.")
    check_form(options, {}, "big_vision model")
    theirs = to_big_vision(weights.params, scan=target.scan)
    write_npz(target.path, {f"params/{name}": value for name, value in theirs.items()})
