"""The heads alone of a GLIP of configs/glip_demo.py tuned.

COMMAND   python -m capvl.main --config=configs/glip_demo_linear.py:shots=3 --config.init_from=runs/glip_demo
          or in a sweep beside the others: configs/glip_demo_tuned.py
DATA      as configs/glip_demo_tuned.py
CHIPS     a CPU core for a minute
EXPECTED  docs/results.md
"""

import glip_demo_tuned


def get_config():
    config = glip_demo_tuned.get_config()
    config.optimizer.update(lr=1e-3, lr_mult=(), frozen=("(encoder|pyramid|text|tower)/.*",))
    return config
