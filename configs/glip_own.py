"""A detector of one's own classes from scratch, on a small data set with boxes, in minutes (docs/own_data.md).

COMMAND   python -m capvl.main --config=configs/glip_own.py --workdir=runs/mine
              --config.model.classes="('cat', 'dog')" --config.model.length=2
          your classes, a closed list, and their number. Photos: more steps, and --config.model.res=192
              --config.model.max_side=256; good detectors of photos begin with a pre-trained GLIP, whose classes are
              words: configs/glip_odinw.py
DATA      python -m capvl.data.prepare regions --name=mine --format=coco_style --train=mine/train.json
              --val=mine/val.json --files=mine
CHIPS     two CPU cores
EXPECTED  AP 0.805, AP50 0.924 on 200 drawn images of 96 px, eight classes, after 7 minutes on 2,000 (seed 0):
              docs/notebooks/7_own_detector.ipynb
"""

import glip_demo_closed

from capvl.data.scenes.world import SHAPES


def get_config():
    config = glip_demo_closed.get_config()
    config.steps = 600
    config.objective.slots = 20
    config.model.update(classes=SHAPES, length=len(SHAPES))
    config.data.update(name="mine", tokenizer="")
    config.eval_every = 200
    config.evals = dict(detection=dict(each=True))
    return config
