"""X-VLM's two epochs on regions with the losses of boxes alone, between pre-training and xvlm_grounding.py.

COMMAND   see xvlm_grounding.py
DATA      the regions of xvlm_4m.py
CHIPS     a TPU VM, such as v5e:2x4
EXPECTED  not run by us
"""

import xvlm_4m

IMAGES = 210_000


def get_config():
    config = xvlm_4m.get_config()
    config.batch_size = 72
    config.steps = 2 * IMAGES // 72
    losses = dict(itc=0.0, itm=0.0, mlm=0.0, l1=1.0, giou=1.0)
    config.objective = dict(name="xvlm", kinds=("regions",), captions=False, group=(9, 24), **losses)
    config.model.update(heads=("box",), reads_end=True)
    config.data.name = "coco*0.11 + visual_genome*0.1"
    config.optimizer.update(lr=3e-5, lr_mult=())
    config.schedule = dict(kind="linear", warmup=config.steps // 10)
    config.eval_every = 0
    config.evals = dict(grounding=dict(name="refcoco_plus", split="val", method="box"))
    config.variants.update(data="data.name")
    return config
