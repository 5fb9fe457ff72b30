"""GLIP-L (arXiv 2112.03857): Swin-L, BERT and eight blocks of deep fusion, on 27 M images.

COMMAND   python -m capvl.main --config=configs/glip_l.py --workdir=gs://…/glip_l
              --config.init_from="gs://…/swin_l_22k_384 + gs://…/bert_base"
DATA      FourODs: 2.66 M images of Objects365, OpenImages, Visual Genome and ImageNet's boxes; GoldG+, 1.3 M;
          24 M captions with a teacher's boxes (docs/glip.md). The repetitions are the paper's
CHIPS     a TPU pod slice, as glip_t.py
EXPECTED  not run by us. The paper, zero-shot AP on COCO / LVIS minival 49.8 / 37.3; fine-tuned on COCO 60.8
"""

import glip_t


def get_config():
    config = glip_t.get_config()
    config.steps = 1_000_000
    config.model.update(encoder="swin-L/4", window=12, drop_path=0.4, blocks=8)
    config.data.name = (
        "objects365*1.32 + visual_genome*0.3 + imagenet_boxes*1.0 + openimages*1.7 "
        "+ flickr30k_entities*0.24 + gqa_mixed*2.0 + cap24m*24.0"
    )
    # Up to 20 other captions stand behind an image's own, as negatives.
    config.objective.packed = 20
    config.optimizer.weight_decay = 0.01
    return config
