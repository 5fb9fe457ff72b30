"""Trains a tokenizer from a data set's captions.

python -m capvl.data.tokenizer --data=flickr8k --vocab=4000 --out=flickr8k.model
python -m capvl.data.tokenizer --data=flickr8k --vocab=4000 --kind=wordpiece --out=flickr8k.txt
"""

import argparse

from capvl.command import run


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m capvl.data.tokenizer", description="Train a tokenizer from a data set's captions."
    )
    parser.add_argument(
        "--kind", choices=("unigram", "wordpiece"), default="unigram", help="SentencePiece's, or BERT's word pieces"
    )
    parser.add_argument("--data", required=True, help="a prepared data set, by name or folder")
    parser.add_argument("--split", default="train")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--vocab", type=int, required=True, help="number of pieces")
    parser.add_argument("--out", required=True, help="path of the .model file (wordpiece: .txt) to write")
    args = parser.parse_args(argv)

    from capvl.data.reading import sources  # Slow to import, and --help doesn't wait for it.
    from capvl.data.text.training import TRAINERS

    source = sources.open_source(args.data, args.split, args.data_dir, features=("text",))
    tokenizer = TRAINERS[args.kind](
        (text for i in range(len(source)) for text in source[i]["text"]), args.vocab, args.out
    )
    print(f"{args.out}: {tokenizer.vocab} pieces from {len(source)} examples")


if __name__ == "__main__":
    run(main)
