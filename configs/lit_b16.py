"""LiT on a CapPa encoder: the recipe of lit_l16.py with ViT-B/16.

COMMAND   python -m capvl.main --config=configs/lit_b16.py --config.init_from=gs://…/cappa_b16 --workdir=gs://…/lit_b16
DATA      as lit_l16.py
CHIPS     a TPU pod slice; not yet run at this size by us
EXPECTED  not measured by us
"""

import lit_l16


def get_config():
    config = lit_l16.get_config()
    config.model.encoder = "B/16"
    config.model.text = "B"
    config.init_from = "runs/cappa_b16"
    return config
