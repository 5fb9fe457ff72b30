"""Counts in how many images of a data set the n-grams of its captions occur, for self-critical training.

python -m capvl.data.frequencies --data=flickr8k --tokenizer=flickr8k.txt --out=flickr8k_frequencies.npz
"""

import argparse

from capvl.command import run


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m capvl.data.frequencies", description="Count n-grams of captions.", allow_abbrev=False
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--tokenizer", required=True, help="as in training")
    parser.add_argument("--captions", type=int, default=5, help="of an image, the first so many")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv)

    from capvl.data.reading import sources  # Slow to import, and --help doesn't wait for it.
    from capvl.data.text import tokenizers
    from capvl.data.text.frequencies import write

    source = sources.open_source(args.data, args.split, args.data_dir, features=("text",))
    number = write(args.out, source, tokenizers.load(args.tokenizer, False), args.captions)
    print(f"{args.out}: n-grams of {number} images")


if __name__ == "__main__":
    run(main)
