"""CapPa parameters in big_vision's naming, read and written without loss.

Both of its layouts are known: unrolled (`encoderblock_0`, `EncDecBlock0`) and scanned
(`encoderblock` stacked on axis 0, `EncDecBlock` stacked on axis 1).

    python -m capvl.convert.big_vision WORKDIR OUT.npz [--scan]      # a run's parameters -> big_vision

The other way, `config.init_from=FILE.npz` begins a run with big_vision's parameters.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.errors import UserError

_ENCODER = "encoder/Transformer/encoderblock"
_DECODER = "decoder/EncDecBlock"

# Ours -> theirs; a tuple is fused along the axis after the input width.
_DIRECT = {
    "encoder/stem/kernel": "encoder/embedding/kernel",
    "encoder/stem/bias": "encoder/embedding/bias",
    "encoder/norm/scale": "encoder/Transformer/encoder_norm/scale",
    "encoder/norm/bias": "encoder/Transformer/encoder_norm/bias",
    "decoder/tokens": "decoder/EmbedTargets/embedding",
    "decoder/norm/scale": "decoder/LayerNorm/scale",
    "decoder/norm/bias": "decoder/LayerNorm/bias",
    "decoder/logits/kernel": "decoder/LogitsDense/kernel",
    "decoder/logits/bias": "decoder/LogitsDense/bias",
}
_WITH_BATCH_AXIS = {
    "encoder/positions": "encoder/pos_embedding",
    "decoder/positions": "pos_embedding_decoder",
    "encoder/cls": "encoder/cls",
    "encoder/map/probe": "encoder/MAPHead_0/probe",
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


def is_scanned(theirs: Mapping[str, Any]) -> bool:
    """Whether the parameters are in the scanned layout."""
    return any(k.startswith(_DECODER + "/") or k.startswith(_ENCODER + "/") for k in theirs)


def from_big_vision(theirs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Ours from a flat dict of big_vision's CapPa parameters (a leading `params/` is dropped).

    Raises:
      UserError: parameters are missing, or some are not known.
    """
    theirs = {k.removeprefix("params/"): np.asarray(v) for k, v in theirs.items()}
    layers = _unstack(theirs) if is_scanned(theirs) else theirs
    left = dict(layers)

    def take(key):
        if key not in left:
            raise UserError(f"The parameters lack {key!r}, so they are not a whole big_vision CapPa model.")
        return left.pop(key)

    ours = {name: take(key) for name, key in _DIRECT.items()}
    for name, key in _WITH_BATCH_AXIS.items():
        if key in left:
            ours[name] = take(key)[0]
    _take_layers(ours, take, "encoder/blocks", "encoder/Transformer/encoderblock_", _ENCODER_LAYER, layers)
    depth = _take_layers(ours, take, "decoder/blocks", "decoder/EncDecBlock", _DECODER_LAYER, layers)
    ours["decoder/cross_kv"] = np.stack(
        [np.stack([take(f"decoder/EncDecBlock{i}/{part}/kernel") for part in _CROSS_KV], 1) for i in range(depth)]
    )
    if "encoder/map/probe" in ours:
        for name, keys in _MAP.items():
            for leaf in _leaves(layers, f"encoder/MAPHead_0/{keys[0]}"):
                ours[f"encoder/map/{name}/{leaf}"] = _fuse(
                    name, leaf, [take(f"encoder/MAPHead_0/{k}/{leaf}") for k in keys]
                )
    if left:
        raise UserError(
            f"The parameters have {len(left)} leaves that CapPa does not know: {', '.join(sorted(left)[:5])}."
        )
    return ours


def to_big_vision(ours: Mapping[str, Any], *, scan: bool = False) -> dict[str, np.ndarray]:
    """big_vision's flat names (without `params/`) for our parameters, in either of its layouts."""
    ours = {k: np.asarray(v) for k, v in ours.items()}
    theirs = {key: ours[name] for name, key in _DIRECT.items()}
    theirs |= {key: ours[name][None] for name, key in _WITH_BATCH_AXIS.items() if name in ours}
    _give_layers(theirs, ours, "encoder/blocks", "encoder/Transformer/encoderblock_", _ENCODER_LAYER)
    _give_layers(theirs, ours, "decoder/blocks", "decoder/EncDecBlock", _DECODER_LAYER)
    for i, kernel in enumerate(ours["decoder/cross_kv"]):
        for part, name in enumerate(_CROSS_KV):
            theirs[f"decoder/EncDecBlock{i}/{name}/kernel"] = kernel[:, part]
    for name, keys in _MAP.items():
        for leaf in _leaves(ours, f"encoder/map/{name}"):
            parts = _unfuse(name, leaf, ours[f"encoder/map/{name}/{leaf}"], len(keys))
            theirs |= {f"encoder/MAPHead_0/{k}/{leaf}": p for k, p in zip(keys, parts, strict=True)}
    return _restack(theirs) if scan else theirs


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


def _take_layers(ours, take, prefix, their_prefix, table, theirs) -> int:
    numbers = {int(m[1]) for k in theirs if (m := re.match(re.escape(their_prefix) + r"(\d+)/", k))}
    depth = len(numbers)
    for name, keys in table.items():
        for leaf in _leaves(theirs, f"{their_prefix}0/{keys[0]}"):
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


def _unstack(theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for key, value in theirs.items():
        for stem, numbered, axis in ((_ENCODER, _ENCODER + "_{}", 0), (_DECODER, _DECODER + "{}", 1)):
            if key.startswith(stem + "/"):
                for i, layer in enumerate(np.moveaxis(value, axis, 0)):
                    out[numbered.format(i) + key[len(stem) :]] = layer
                break
        else:
            out[key] = value
    return out


def _restack(theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out, groups = {}, {}
    for key, value in theirs.items():
        match = re.fullmatch(rf"({_ENCODER})_(\d+)(/.*)|({_DECODER})(\d+)(/.*)", key)
        if not match:
            out[key] = value
            continue
        stem, index, rest = [g for g in match.groups() if g is not None]
        groups.setdefault((stem, rest), {})[int(index)] = value
    for (stem, rest), layers in groups.items():
        axis = 0 if stem == _ENCODER else 1
        out[stem + rest] = np.stack([layers[i] for i in range(len(layers))], axis=axis)
    return out


def main(argv: list[str] | None = None) -> None:
    """The command."""
    from capvl.checkpoint import Checkpointer

    parser = argparse.ArgumentParser(description="Write a run's parameters as a big_vision .npz.", allow_abbrev=False)
    parser.add_argument("workdir")
    parser.add_argument("out", help="the .npz to write")
    parser.add_argument("--scan", action="store_true", help="in the scanned layout")
    args = parser.parse_args(argv)
    params, step = Checkpointer(args.workdir).read_params(None)
    theirs = to_big_vision(params, scan=args.scan)
    try:
        np.savez(args.out, **{f"params/{k}": v for k, v in theirs.items()})
    except OSError as e:
        raise UserError(f"{args.out!r} can't be written: {e.strerror or e}.") from e
    print(f"{args.out}: {len(theirs)} arrays of step {step}")


if __name__ == "__main__":
    from capvl.main import run

    run(main)
