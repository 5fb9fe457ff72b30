"""GIT2's sizes: an encoder of 4.8 B parameters and a decoder of BERT-large's shape, 0.3 B.

The paper's encoder is a DaViT; this one is a ViT of as many parameters.

COMMAND   python -m capvl.main --config=configs/git2.py --workdir=gs://…/git2 --config.init_from=gs://…/contrastive
DATA      as git_b16.py; the paper's 10.5 B pairs
CHIPS     a TPU pod, such as v5p:8x8x8
EXPECTED  not measured by us
"""

import git_h14


def get_config():
    config = git_h14.get_config()
    config.model.encoder = "w1792d70h16m15360/14"
    config.model.text = "w1024d24h16m4096"
    config.model.res = 224
    config.mesh = dict(replica=-1, fsdp=64, tensor=1)
    config.init_from = "runs/contrastive"
    return config
