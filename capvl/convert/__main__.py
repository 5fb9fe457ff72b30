"""Weights in and out.

python -m capvl.convert --from=huggingface --to=capvl openai-clip-vit-base-patch16/ clip_b16/
python -m capvl.convert --from=git --to=capvl GIT_BASE_COCO/snapshot/model.pt git_b/ --allow_pickle
python -m capvl.convert --from=xvlm --to=capvl 4m_base_model_state_step_199999.th xvlm_b/ --allow_pickle
python -m capvl.convert --from=glip --to=capvl model_0270000.pth glip_t/ --allow_pickle --ema --tokenizer=vocab.txt
python -m capvl.convert --from=capvl --to=huggingface runs/lit_demo exported/
python -m capvl.convert --from=capvl --to=xvlm runs/xvlm_4m exported.th
python -m capvl.convert --from=capvl --to=stablehlo runs/cappa_demo encoder.stablehlo
python -m capvl.convert --from=capvl --to=stablehlo glip_t/ detector.stablehlo --classes=names.txt
"""

import argparse
import dataclasses

from capvl import lines
from capvl.command import run
from capvl.convert import formats


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m capvl.convert", description="Convert weights.", allow_abbrev=False)
    parser.add_argument("--from", dest="source", required=True, choices=formats.SOURCES)
    parser.add_argument("--to", dest="target", required=True, choices=formats.TARGETS)
    parser.add_argument("src", help="a file or folder; for capvl: a workdir or a converted folder")
    parser.add_argument(
        "dst", help="a new folder; for big_vision an .npz, for stablehlo a file, for xvlm, glip also a .pth"
    )
    parser.add_argument("--tokenizer", default="", help="a file to go with the model, where SRC has none")
    parser.add_argument("--heads", type=int, default=0, help="of the attention, where nothing else tells")
    parser.add_argument("--scan", action="store_true", help="big_vision's scanned layout")
    parser.add_argument("--allow_pickle", action="store_true", help="read PyTorch pickles, weights only")
    parser.add_argument(
        "--ema", action="store_true", help="the running mean of the parameters, of a pickle that holds it"
    )
    parser.add_argument("--classes", default="", help="file of names that an exported detector looks for")
    parser.add_argument("--trust", action="store_true", help="import the code that SRC, a workdir, names")
    args = parser.parse_args(argv)

    classes = tuple(lines.read_lines(args.classes, "classes")) if args.classes else ()
    # JAX is slow to import, and --help doesn't wait for it.
    from capvl.convert.tokens import of_vocabulary
    from capvl.data.text import tokenizers
    from capvl.models.parameters import Blueprint

    how = dict(heads=args.heads, allow_pickle=args.allow_pickle, trust=args.trust, ema=args.ema)
    weights = formats.read(args.source, args.src, **how)
    if args.tokenizer:
        tokenizers.load(args.tokenizer)
        if weights.tokenizer:
            tokenizers.check_same_pieces(args.tokenizer, weights.tokenizer)
        weights = dataclasses.replace(weights, tokenizer=args.tokenizer)
    formats.write(args.target, args.dst, weights, scan=args.scan, classes=classes)
    count = sum(v.size for v in weights.params.values())
    lacks = not weights.tokenizer and of_vocabulary(Blueprint(weights.options).axes.values())
    words = ", without a tokenizer" if lacks else ""
    print(f"{args.dst}: {len(weights.params)} arrays, {count / 1e6:.1f} M parameters from {args.src}{words}")


if __name__ == "__main__":
    run(main)
