"""SigLIP (arXiv 2303.15343): both towers from scratch with the sigmoid loss.

COMMAND   python -m capvl.main --config=configs/siglip_b16.py --workdir=gs://…/siglip_b16
DATA      as cappa_l16.py
CHIPS     a TPU pod slice; not yet run at this size by us
EXPECTED  not measured by us
"""

import clip_b16


def get_config():
    config = clip_b16.get_config()
    config.objective.loss_kind = "sigmoid"
    return config
