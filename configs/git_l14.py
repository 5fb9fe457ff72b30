"""GIT_L: CLIP's ViT-L/14, otherwise as git_b16.py (arXiv 2205.14100, section 4.1).

COMMAND   python -m capvl.main --config=configs/git_l14.py --workdir=gs://…/git_l14 --config.init_from=clip_l14
DATA      as git_b16.py, with CC12M: 20 M pairs
CHIPS     a TPU pod slice, such as v5e:8x8
EXPECTED  planned, not run (docs/performance.md); the paper's GIT_L has 138.5 CIDEr on COCO after fine-tuning
"""

import git_b16


def get_config():
    config = git_b16.get_config()
    config.steps = 146_000  # 30 epochs of 20 M pairs
    config.model.encoder = "L/14"
    config.mesh = dict(replica=-1, fsdp=64, tensor=1)  # Whole weights on a chip would need 17.3 GiB of a v5e's 15.75.
    config.objective.sides = (168, 182, 196, 210, 224)
    config.init_from = "clip_l14"
    return config
