"""CLIP*: both towers from scratch with the softmax loss, the baseline of CapPa (arXiv 2306.07915, section 4).

COMMAND   python -m capvl.main --config=configs/clip_b16.py --workdir=gs://…/clip_b16
          variants: :loss=sigmoid is SigLIP (configs/siglip_b16.py)
DATA      as cappa_l16.py
CHIPS     a TPU pod slice; not yet run at this size by us
EXPECTED  not measured by us
"""

import lit_b16


def get_config():
    config = lit_b16.get_config()
    config.steps = 366_500
    config.batch_size = 8192
    config.objective = dict(name="contrastive", loss_kind="softmax")
    config.init_from = ""
    config.init_only = ()
    return config
