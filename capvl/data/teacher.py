"""Grounds the captions of a data set by a detector that reads captions, as lines of ODVG with scores (`pseudo_boxes`).

python -m capvl.data.teacher --data=web --split=train --model=runs/glip_t --out=web.jsonl
python -m capvl.data.prepare regions --name=web_boxes --format=odvg --train=web.jsonl --allow_leaks
"""

import argparse
import shlex
from collections.abc import Sequence

from capvl.command import run
from capvl.data.preparing import pseudo_boxes
from capvl.data.preparing.pseudo_boxes import Found, Teacher
from capvl.data.reading import sources
from capvl.data.text.noun_phrases import noun_phrases
from capvl.data.text.tokenizers import too_long

SURE = 0.5
"""Of GLIP's own pseudo boxes."""


def load(path: str) -> Teacher:
    """A model as a teacher. A caption without noun phrases, or one that is too long for the model, has no boxes; nor
    has one of an image that is too small for it (`capvl.inference.finding.too_small`).

    Args:
      path: as `capvl.load` takes it.
    """
    from capvl import loading  # Slow to import, and --help doesn't wait for it.
    from capvl.inference.finding import too_small

    model = loading.load(path)

    def teach(images: Sequence[bytes], captions: Sequence[str]) -> list[list[Found]]:
        long = set(too_long(model.tokenizer, captions, model.options.length))
        said = [i for i, text in enumerate(captions) if text not in long and noun_phrases(text)]
        asked = [i for i in said if not too_small(model, images[i])]
        rows: list[list[Found]] = [[] for _ in captions]
        if not asked:
            return rows
        given = model.ground([images[i] for i in asked], [captions[i] for i in asked], threshold=0.0)
        for i, found in zip(asked, given, strict=True):
            boxes = (tuple(map(float, box)) for box in found.boxes)
            told = zip(boxes, found.spans, found.scores, strict=True)
            rows[i] = [Found(box, first, end, float(score)) for box, (first, end), score in told]
        return rows

    return teach


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m capvl.data.teacher", description="Boxes for captions by a model.", allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="a prepared data set with captions")
    parser.add_argument("--split", default="train")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--model", required=True, help="workdir or converted folder of a detector that reads captions")
    parser.add_argument("--out", required=True, help="of the lines")
    parser.add_argument("--min_score", type=float, default=SURE)
    parser.add_argument("--batch", type=int, default=16, help="captions at a time")
    parser.add_argument("--beam", help="options of Apache Beam, to run there, such as '--runner=DirectRunner'")
    args = parser.parse_args(argv)
    told = pseudo_boxes.write(
        args.data,
        args.split,
        args.out,
        args.data_dir or sources.default_data_dir(),
        load,
        args.model,
        batch=args.batch,
        min_score=args.min_score,
        beam=None if args.beam is None else shlex.split(args.beam),
    )
    left = "".join(f", {n} x {reason} ({', '.join(names)})" for reason, (n, names) in told["rejected"].items())
    print(f"{args.out}: {told['boxes']} boxes of {told['captions']} captions; left out: {left[2:] or 'nothing'}")


if __name__ == "__main__":
    # By its name, not as __main__, so that Beam's workers find `load`.
    from capvl.data.teacher import main as command

    run(command)
