"""LiT on real photos: a text tower learns to fit the encoder of cappa_flickr8k.py, which is locked.

COMMAND   python -m capvl.main --config=configs/lit_flickr8k.py --config.init_from=WORKDIR_OF_cappa_flickr8k
          configs/clip_flickr8k.py trains both towers from scratch, for comparison
DATA      flickr8k, flowers5, cifar10 (docs/results.md has the commands)
CHIPS     one CPU core for minutes
EXPECTED  docs/results.md
"""

import cappa_flickr8k


def get_config():
    config = cappa_flickr8k.get_config()
    config.steps = 1500
    config.batch_size = 128
    config.objective = dict(name="contrastive", loss_kind="softmax", locked=True)
    config.model = dict(
        encoder="w128d4h4m512/8",
        res=64,
        pool="map",
        text="w128d2h4m512",
        vocab=2000,
        length=24,
        dtype="float32",
        unroll=True,
    )
    config.init_from = "runs/cappa_flickr8k"
    config.init_only = ("encoder/(?!map/).*",)
    config.optimizer.lr = 1e-3
    config.evals = dict(
        retrieval=dict(name="flickr8k", captions=5),
        flowers=dict(type="zeroshot", name="flowers5"),
        cifar=dict(type="zeroshot", name="cifar10"),
    )
    config.variants = dict(
        init="init_from",
        locked="objective.locked",
        loss="objective.loss_kind",
        seed="seed",
        batch="batch_size",
        steps="steps",
        lr="optimizer.lr",
    )
    return config
