"""What GLIP is compared with: the encoder and tower of configs/glip_demo.py with a closed list of the 64 classes.

COMMAND   python -m capvl.main --config=configs/glip_demo_closed.py
DATA      as configs/glip_demo.py. Eight of the classes are in no training image, so a closed list can't learn them
CHIPS     two CPU cores for 15 minutes
EXPECTED  docs/results.md
"""

import glip_demo

from capvl.data.scenes.world import PAIRS


def get_config():
    config = glip_demo.get_config()
    config.objective.order = "fixed"
    config.model.update(fusion="none", classes=PAIRS, length=len(PAIRS))
    config.optimizer.lr_mult = ()
    del config.evals.phrase_boxes  # It reads no phrases.
    return config
