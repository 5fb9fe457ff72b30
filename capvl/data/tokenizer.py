"""Trains a tokenizer from a data set's captions; where it has none, from what its boxes are called.

python -m capvl.data.tokenizer --data=flickr8k --vocab=4000 --out=flickr8k.model
python -m capvl.data.tokenizer --data=flickr8k --vocab=4000 --kind=wordpiece --out=flickr8k.txt
"""

import argparse
from collections.abc import Iterator

from capvl.command import run


def texts_of(source) -> Iterator[str]:
    """Captions; of an Example without any the names of its regions, as a detector's prompt has them. First, the whole
    closed list of classes where there is one: names whose boxes are all elsewhere are words too.

    Args:
      source: opened with "text?" and `capvl.data.reading.regions.FEATURES`.
    """
    # Slow to import, and --help doesn't wait for it.
    from capvl.data.reading.regions import categories, regions
    from capvl.data.reading.sources import as_text
    from capvl.data.text.category_prompts import SEPARATOR

    said = False
    for i in range(len(source)):
        example = source[i]
        captions = [as_text(text) for text in example.get("text", ())]
        names = [] if captions else [name for region in regions(example) for name in region.names]
        if names and not said:
            said = True
            yield SEPARATOR.join(categories(source))
        yield from captions or ([SEPARATOR.join(names)] if names else [])


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

    # Slow to import, and --help doesn't wait for it.
    from capvl.data.reading import regions, sources
    from capvl.data.text.training import TRAINERS
    from capvl.errors import UserError

    source = sources.open_source(args.data, args.split, args.data_dir, features=("text?", *regions.FEATURES))
    texts = list(texts_of(source))
    if not any(text.strip() for text in texts):
        raise UserError(f"Split {args.split!r} of {args.data!r} has neither captions nor names of boxes to learn from.")
    tokenizer = TRAINERS[args.kind](texts, args.vocab, args.out)
    print(f"{args.out}: {tokenizer.vocab} pieces from {len(source)} examples")


if __name__ == "__main__":
    run(main)
