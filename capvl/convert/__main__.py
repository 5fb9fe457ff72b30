"""Weights in and out.

python -m capvl.convert --from=huggingface --to=capvl openai-clip-vit-base-patch16/ clip_b16/
python -m capvl.convert --from=git --to=capvl GIT_BASE_COCO/snapshot/model.pt git_b/ --allow_pickle
python -m capvl.convert --from=capvl --to=huggingface runs/lit_demo exported/
python -m capvl.convert --from=capvl --to=stablehlo runs/cappa_demo encoder.stablehlo
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np

from capvl.checkpoint import check_leaves
from capvl.command import run
from capvl.convert import pixels, tokens
from capvl.convert.files import read_npz, read_weights, write_safetensors
from capvl.convert.folder import Weights, new_folder, read_model, write_folder
from capvl.errors import UserError
from capvl.models.bert import BertOptions
from capvl.models.encoder import EncoderOptions
from capvl.models.git import GitOptions
from capvl.models.parameters import Blueprint
from capvl.models.two_towers import TwoTowersOptions
from capvl.models.vit import ViTOptions

SOURCES = ("capvl", "big_vision", "huggingface", "git", "open_clip", "timm")
TARGETS = ("capvl", "big_vision", "huggingface", "timm", "stablehlo")
_THEIR_TOKENIZERS = {".json": "tokenizer.json", ".model": "spiece.model", ".txt": "vocab.txt"}


def read(source: str, path: str, *, heads: int = 0, allow_pickle: bool = False, trust: bool = False) -> Weights:
    """A model of another framework (or of ours) as ours.

    Args:
      source: one of SOURCES.
      path: file or folder.
      heads: of the attention, where neither shapes nor a configuration tell; 0 for width / 64.
      allow_pickle: see `capvl.convert.files.read_weights`.
      trust: see `capvl.convert.folder.read_model`.

    Raises:
      UserError: unreadable, or not such a model.
    """
    if source == "capvl":
        return read_model(path, trust=trust)
    weights = _read(source, path, heads, allow_pickle)
    # What a configuration says of sizes is compared with the arrays.
    stored = {k: [list(v.shape), str(v.dtype)] for k, v in weights.params.items()}
    check_leaves(stored, Blueprint(weights.options).shapes, path)
    return weights


def _read(source: str, path: str, heads: int, allow_pickle: bool) -> Weights:
    if source == "big_vision":
        from capvl.convert.big_vision import from_big_vision
        from capvl.convert.shapes import options_of

        params = from_big_vision(read_npz(path))
        return Weights(params, options_of(params), "big_vision", crop="squash")
    theirs, config = read_weights(path, allow_pickle=allow_pickle)
    tokenizer = tokens.find(path)
    if source == "huggingface":
        return _read_hugging_face(theirs, config, path, tokenizer)
    if source == "git":
        from capvl.convert import git

        options, params = git.read_official(theirs, heads)
        return Weights(params, options, "hugging_face", tokenizer, interpolation="bicubic")
    if source == "timm":
        from capvl.convert.timm import read_timm

        options, params = read_timm(theirs, config, heads)
        how = pixels.of_timm(config.get("pretrained_cfg") or {}, options.res)
        return _weights(params, options, how, "timm")
    from capvl.convert.open_clip import read_open_clip

    options, params = read_open_clip(theirs, config, heads)
    text = config.get("model_cfg", config)["text_cfg"]
    clean = tokens.open_clip_cleaning(text, tokenizer) if tokenizer else ""
    if options.text_pool == "last":  # Which reads the padding.
        options = dataclasses.replace(options, text_pad=_padding(tokenizer, text))
    return _weights(params, options, pixels.of_open_clip(config), "timm", tokenizer, clean)


def _padding(tokenizer: str, text: dict) -> int:
    """Id of the padding that an open_clip text tower reads."""
    found = tokens.padding(tokenizer)
    if found is None:
        known = {"SigLIP2": 0, "SigLIP": 1}  # Theirs have these, whatever their size.
        found = next((i for name, i in known.items() if name in str(text.get("hf_tokenizer_name"))), None)
    if found is None:
        raise UserError(
            "The text tower reads its padding (pool_type='last'), and no tokenizer beside says which id it is."
        )
    return found


def _weights(params, options, how: pixels.Pixels, resize: str, tokenizer: str = "", clean: str = "") -> Weights:
    """Of a model with an image tower; one that is alone becomes an encoder by itself."""
    if type(options) is ViTOptions:
        options = EncoderOptions(**dataclasses.asdict(options))
    options = dataclasses.replace(options, pixels=how.pixels)
    seen = dict(crop=how.crop, crop_fraction=how.crop_fraction, interpolation=how.interpolation)
    return Weights(params, options, resize, tokenizer, clean, **seen)


def _read_hugging_face(theirs: dict[str, np.ndarray], config: dict, path: str, tokenizer: str) -> Weights:
    from capvl.convert import bert, git, hugging_face, siglip, vit

    kind = str(config.get("model_type", "")).removesuffix("_vision_model").removesuffix("_text_model")
    readers = {
        "clip": hugging_face.read_clip,
        "siglip": lambda theirs, config: siglip.read_siglip(theirs, config, tokens.padding(tokenizer)),
        "vit": vit.read_vit,
        "git": git.read_hugging_face,
        "bert": bert.read_bert,
    }
    if kind not in readers:
        raise UserError(
            f"{path!r} needs a config.json beside its weights whose model_type is one of {', '.join(readers)}; "
            f"found {config.get('model_type')!r}."
        )
    options, params = readers[kind](theirs, config)
    if kind == "bert":
        return Weights(params, options, "hugging_face", tokenizer)
    folder = pathlib.Path(path)
    how = pixels.of_hugging_face(folder if folder.is_dir() else folder.parent, kind, options.res)
    return _weights(params, options, how, "hugging_face", tokenizer)


def write(target: str, path: str, weights: Weights, *, scan: bool = False) -> None:
    """Writes our model for another framework (or as a folder of ours).

    Args:
      target: one of TARGETS.
      path: a new folder, or for big_vision and stablehlo a file.
      weights: the model.
      scan: big_vision's scanned layout.

    Raises:
      UserError: the model is not of a form that the framework has, or can't be written.
    """
    options, params = weights.options, weights.params
    if target == "capvl":
        write_folder(path, weights)
    elif target == "big_vision":
        from capvl.convert.big_vision import to_big_vision

        if isinstance(options, BertOptions) or getattr(options, "text_norm", "pre") != "pre":
            raise UserError("big_vision has no form of this BERT.")
        _save_npz(path, {f"params/{k}": v for k, v in to_big_vision(params, scan=scan).items()})
    elif target == "stablehlo":
        from capvl.convert.stablehlo import export

        export(path, options, params)
    elif target == "timm":
        from capvl.convert.timm import write_timm

        if isinstance(options, BertOptions):
            raise UserError("timm has image models only, and this model has no image tower.")
        state, config = write_timm(options, params)
        config["pretrained_cfg"] |= pixels.to_timm(weights)
        _save_folder(path, state, config)
    else:
        _save_folder(path, *_to_hugging_face(options, params))
        if not isinstance(options, BertOptions):
            pixels.write_processor(pathlib.Path(path), options, weights)
        if weights.tokenizer:
            name = _THEIR_TOKENIZERS.get(pathlib.Path(weights.tokenizer).suffix, pathlib.Path(weights.tokenizer).name)
            tokens.copy(weights.tokenizer, pathlib.Path(path), name, weights.clean)


def _to_hugging_face(options, params):
    from capvl.convert import bert, git, hugging_face, siglip

    if isinstance(options, BertOptions):
        return bert.write_bert(options, params)
    if isinstance(options, GitOptions):
        return git.write_hugging_face(options, params)
    if isinstance(options, TwoTowersOptions) and options.pool == "cls":
        return hugging_face.write_clip(options, params)
    if isinstance(options, TwoTowersOptions):
        return siglip.write_siglip(options, params)
    # A captioner's or an encoder's image tower.
    return siglip.write_siglip(options, {k: v for k, v in params.items() if k.startswith("encoder/")})


def _save_npz(path: str, arrays: dict[str, np.ndarray]) -> None:
    from etils import epath

    from capvl import storage

    try:
        with storage.new_file(epath.Path(path)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    except OSError as e:
        raise UserError(f"{path!r} can't be written: {e.strerror or e}.") from e


def _save_folder(path: str, state: dict[str, np.ndarray], config: dict) -> None:
    folder = new_folder(path)
    write_safetensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Convert weights.", allow_abbrev=False)
    parser.add_argument("--from", dest="source", required=True, choices=SOURCES)
    parser.add_argument("--to", dest="target", required=True, choices=TARGETS)
    parser.add_argument("src", help="a file or folder; for capvl: a workdir or a converted folder")
    parser.add_argument("dst", help="a new folder; for big_vision an .npz, for stablehlo a file")
    parser.add_argument("--tokenizer", default="", help="a file to go with the model, where SRC has none")
    parser.add_argument("--heads", type=int, default=0, help="of the attention, where nothing else tells")
    parser.add_argument("--scan", action="store_true", help="big_vision's scanned layout")
    parser.add_argument("--allow_pickle", action="store_true", help="read PyTorch pickles, weights only")
    parser.add_argument("--trust", action="store_true", help="import the code that SRC, a workdir, names")
    args = parser.parse_args(argv)
    weights = read(args.source, args.src, heads=args.heads, allow_pickle=args.allow_pickle, trust=args.trust)
    if args.tokenizer:
        from capvl.data.text import tokenizers as tokenizer

        tokenizer.load(args.tokenizer)
        if weights.tokenizer:
            tokenizer.check_same_pieces(args.tokenizer, weights.tokenizer)
        weights = dataclasses.replace(weights, tokenizer=args.tokenizer)
    write(args.target, args.dst, weights, scan=args.scan)
    count = sum(v.size for v in weights.params.values())
    lacks = ", without a tokenizer" if hasattr(weights.options, "vocab") and not weights.tokenizer else ""
    print(f"{args.dst}: {len(weights.params)} arrays, {count / 1e6:.1f} M parameters from {args.src}{lacks}")


if __name__ == "__main__":
    run(main)
