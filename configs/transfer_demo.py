"""A small decoder on the locked encoder of the CapPa demo: captions, classes and answers at once.

COMMAND   python -m capvl.main --config=configs/cappa_demo.py && python -m capvl.main --config=configs/transfer_demo.py
DATA      scenes/demo, 6,000 images of 64 px with captions, classes and questions
CHIPS     2 CPU cores
EXPECTED  docs/results.md
"""

import cappa_demo


def get_config():
    config = cappa_demo.get_config()
    config.steps = 800
    config.batch_size = 64
    config.objective = dict(name="transfer")
    config.model.vocab = 131
    config.init_from = "runs/cappa_demo"
    config.init_only = ("encoder/.*",)
    config.evals = dict(
        answers=dict(type="vqa"),
        classes=dict(type="vqa", task="classify"),
        captions=dict(count=24),
    )
    config.variants = dict(
        steps="steps", batch="batch_size", lr="optimizer.lr", locked="objective.locked", seed="seed", init="init_from"
    )
    return config
