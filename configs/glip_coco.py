"""GLIP fine-tuned on COCO: all 80 classes in one prompt, in a fixed order (arXiv 2112.03857, section 4.1).

COMMAND   python -m capvl.main --config=configs/glip_coco.py --workdir=gs://…/glip_coco --config.init_from=gs://…/glip_t
          converted weights are evaluated by python -m capvl.evaluate glip_t/ --config=configs/glip_coco.py
DATA      python -m capvl.data.prepare regions --name=coco --format=coco (docs/data.md)
CHIPS     a TPU VM, such as v5e:2x4
EXPECTED  not run by us. The paper, AP on val: (A) 52.9, (B) 53.8, (C) 55.1, T 54.9, L 60.8
"""

import glip_t


def get_config():
    config = glip_t.get_config()
    config.batch_size = 32
    config.steps = 24 * 118_287 // 32
    config.objective.update(texts=("classes",), order="fixed")
    config.data.name = "coco"
    config.optimizer.update(lr=1e-5, lr_mult=((glip_t.BIAS, 2.0),))
    config.schedule.warmup = 500
    config.eval_every = 118_287 // 32
    config.evals = dict(detection=dict(name="coco", split="val"))
    return config
