"""CapPa with ViT-H/14: the recipe of cappa_l16.py with another encoder.

COMMAND   python -m capvl.main --config=configs/cappa_h14.py --workdir=gs://…/cappa_h14
DATA      as cappa_l16.py
CHIPS     a TPU pod slice; not yet run at this size by us
EXPECTED  not measured by us
"""

import cappa_l16


def get_config():
    config = cappa_l16.get_config()
    config.model.encoder = "H/14"
    return config
