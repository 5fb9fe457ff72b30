"""CapPa and a contrastive loss together on one image encoder, after CoCa (arXiv 2205.01917), for comparison.

COMMAND   python -m capvl.main --config=configs/coca_b16.py --workdir=gs://…/coca_b16
DATA      as cappa_l16.py
CHIPS     a TPU pod slice; not yet run at this size by us
EXPECTED  not measured by us
"""

import clip_b16


def get_config():
    config = clip_b16.get_config()
    config.objective = dict(name="contrastive", loss_kind="softmax", caption_weight=2.0, pa=0.75)
    config.model.decoder_layers = 6
    return config
