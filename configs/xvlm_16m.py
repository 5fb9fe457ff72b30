"""X-VLM on 16 M images: xvlm_4m.py with Objects365, OpenImages and CC12M.

COMMAND   python -m capvl.main --config=configs/xvlm_16m.py --workdir=gs://…/xvlm_16m
              --config.init_from="gs://…/swin_b_22k + gs://…/bert_base"
              --config.init_only="('encoder/.*', 'text/(?!cross/cross).*')"
DATA      as xvlm_4m.py, with 11.1 M images of CC12M, and regions of Objects365 (0.58 M images) and OpenImages (1.7 M).
          The original's list also has RefCOCO's images "without leaks"; ours leaves them out
CHIPS     a TPU pod slice: docs/performance.md has a plan for v5e:16x16
EXPECTED  not run by us; the original's README: R@1 on COCO 81.2 of texts, 63.4 of images, fine-tuned
"""

import xvlm_4m


def get_config():
    config = xvlm_4m.get_config()
    config.batch_size = 3072
    # 12 pairs and 3 images with regions on each of 256 chips; the original's mean is 2.25.
    config.objective.share = 0.25
    config.objective.masks = 6
    config.model.length = 30
    config.data.name = (
        "pairs=coco*0.11 + visual_genome*0.1 + sbu*0.86 + cc3m*2.9 + cc12m*11.1 + "
        "regions=coco*0.11 + visual_genome*0.1 + objects365*0.58 + openimages*1.7"
    )
    return config
