"""X-VLM with CLIP's ViT-B/16, in whose last four layers regions see themselves alone (the official `use_clip_vit`).

COMMAND   python -m capvl.main --config=configs/xvlm_4m_vit.py --workdir=gs://…/xvlm_4m_vit
              --config.init_from="gs://…/clip_b16 + gs://…/bert_base"
              --config.init_only="('encoder/.*', 'text/(?!cross/cross).*')"
DATA      as xvlm_4m.py
CHIPS     as xvlm_4m.py
EXPECTED  not run by us; the authors find CLIP's ViT-B about as good as Swin-B
"""

import xvlm_4m


def get_config():
    config = xvlm_4m.get_config()
    config.model = dict(
        encoder="B/16",
        res=224,
        pool="cls",
        class_position=True,
        pre_norm=True,
        activation="quick_gelu",
        eps=1e-5,
        pixels="clip",
        local_layers=4,
        text="B",
        cross_layers=6,
        length=40,
        reads_end=False,
    )
    return config
