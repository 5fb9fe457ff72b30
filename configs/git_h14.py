"""GIT at the paper's third size, with a ViT-H/14 in place of its CoSwin-H (which was not released).

clip_h14 is open_clip's ViT-H-14, converted: it was trained with exact GELU.

COMMAND   python -m capvl.main --config=configs/git_h14.py --workdir=gs://…/git_h14 --config.init_from=gs://…/clip_h14
DATA      as git_b16.py; the paper's 0.8 B pairs, two epochs
CHIPS     a TPU pod slice, such as v5e:16x16
EXPECTED  not measured by us
"""

import git_l14


def get_config():
    config = git_l14.get_config()
    config.steps = 390_000  # 2 epochs of 0.8 B pairs
    config.model.encoder = "H/14"
    config.model.res = 378
    config.model.activation = "gelu"
    config.objective.sides = ()
    config.mesh = dict(replica=-1, fsdp=16, tensor=1)
    config.init_from = "clip_h14"
    return config
