"""Trains recipes on several data sets, with few images and more seeds than one, and tells the means (GLIP on ODinW).

    python -m capvl.sweep --config=full=configs/glip_odinw.py --config=prompt=configs/glip_prompt.py
        --data=aquarium,raccoon --shots=0,1*8,3*4,5*2,10,all --seeds=3,30,300 --epochs=200 --out=runs/odinw

Each has a workdir of its own below --out. A second start goes on where the first was stopped; what is finished is not
run again. OUT/rows.json has a row for each: {"dataset", "shots", "seed", "mode", and what its test gave}.
"""

import argparse

from capvl.command import config_arguments, run


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m capvl.sweep", description="Train recipes on data sets, shots and seeds.", allow_abbrev=False
    )
    parser.add_argument("--config", action="append", required=True, help="MODE=FILE.py[:variant=…]; may be given again")
    parser.add_argument("--data", required=True, help="names of data sets, with commas between them")
    parser.add_argument("--shots", default="all", help="images a class; K*C: C copies an epoch; 0: untrained; all")
    parser.add_argument("--seeds", default="0", help="with commas; which images, and all else that is drawn")
    parser.add_argument("--epochs", type=int, default=0, help="an evaluation after each; 0: as the config says")
    parser.add_argument("--number", default="", help="of the test that is shown; default: called as watch.metric is")
    parser.add_argument("--out", required=True, help="folder of the workdirs")
    args, overrides = config_arguments(parser, argv)

    from capvl import sweeping  # JAX is slow to import, and --help doesn't wait for it.
    from capvl.parallel import distributed

    distributed.start()
    cells = sweeping.cells(args.config, args.data.split(","), args.shots, args.seeds, overrides)
    sweeping.run(cells, args.out, epochs=args.epochs, number=args.number)


if __name__ == "__main__":
    run(main)
