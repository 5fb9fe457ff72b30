"""GLIP's heads alone tuned on a data set of one's own: linear probing (arXiv 2112.03857, section 4.4).

COMMAND   python -m capvl.main --config=configs/glip_linear.py:data=aquarium --config.init_from=gs://…/glip_t
          or in a sweep beside the others: configs/glip_odinw.py
DATA      as configs/glip_odinw.py
CHIPS     a TPU VM, or a GPU
EXPECTED  not run by us. The paper: with deep fusion prompt tuning does better (figure 6)
"""

import glip_odinw


def get_config():
    config = glip_odinw.get_config()
    # Boxes, centerness, projection of the text, temperature and biases learn.
    config.optimizer.update(frozen=("(encoder|pyramid|text|tower)/.*",))
    return config
