"""LiT on the embedded data set: a text tower learns to fit the locked encoder of the CapPa demo.

COMMAND   python -m capvl.main --config=configs/cappa_demo.py && python -m capvl.main --config=configs/lit_demo.py
DATA      scenes/demo, 6,000 images of 64 px
CHIPS     2 CPU cores
EXPECTED  docs/results.md
"""

import cappa_demo


def get_config():
    config = cappa_demo.get_config()
    config.steps = 600
    config.batch_size = 64
    config.objective = dict(name="contrastive", loss_kind="sigmoid", locked=True)
    config.model = dict(
        encoder="w128d4h4m512/8",
        res=64,
        pool="map",
        text="w128d2h4m512",
        vocab=128,
        length=32,
        dtype="float32",
        unroll=True,
    )
    config.init_from = "runs/cappa_demo"
    config.init_only = ("encoder/(?!map/).*",)
    config.optimizer.lr = 1e-3
    config.evals = dict(
        retrieval=dict(name="scenes/demo"),
        zeroshot=dict(name="scenes/demo"),
        fewshot=dict(name="scenes/demo", shots=(10,)),
    )
    config.variants = dict(
        steps="steps",
        batch="batch_size",
        lr="optimizer.lr",
        loss="objective.loss_kind",
        locked="objective.locked",
        seed="seed",
        init="init_from",
    )
    return config
