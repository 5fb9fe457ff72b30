"""GLIP on a plain ViT, such as CapPa's or CLIP's encoder, with a simple feature pyramid (ViTDet, arXiv 2203.16527).

COMMAND   python -m capvl.main --config=configs/glip_t_vit.py --workdir=gs://…/glip_vit
              --config.init_from="gs://…/cappa_b16 + gs://…/bert_base"
              --config.init_only="('encoder/.*', 'text/.*')"
DATA      as configs/glip_t.py
CHIPS     a TPU pod slice, as configs/glip_t.py
EXPECTED  not run by us
"""

import glip_t


def get_config():
    config = glip_t.get_config()
    config.model.update(
        encoder="B/16",
        pad_windows=False,
        level_norms=False,
        activation="gelu_tanh",
        eps=1e-6,
        pixels="half",
        drop_path=0.1,
        drop_block=0.0,
    )
    return config
