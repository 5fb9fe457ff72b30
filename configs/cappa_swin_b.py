"""CapPa with Swin-B instead of a ViT: the recipe of cappa_l16.py on 49 tokens an image.

COMMAND   python -m capvl.main --config=configs/cappa_swin_b.py --workdir=gs://…/cappa_swin_b
          another resolution needs windows that divide it: :res=384,window=12
DATA      as cappa_l16.py
CHIPS     a TPU pod slice, such as v5e:16x16 with --config.mesh.replica=-1 --config.mesh.fsdp=16; not yet run by us
EXPECTED  not measured by us
"""

import cappa_l16


def get_config():
    config = cappa_l16.get_config()
    config.model.update(
        encoder="swin-B/4", window=7, activation="gelu", eps=1e-5, pool="mean", pixels="imagenet", drop_path=0.1
    )
    config.variants.update(window="model.window", drop_path="model.drop_path")
    return config
