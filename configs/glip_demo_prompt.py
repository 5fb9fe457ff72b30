"""Prompt tuning of a GLIP of configs/glip_demo.py: vectors that are added to the text's states.

COMMAND   python -m capvl.main --config=configs/glip_demo_prompt.py:shots=3 --config.init_from=runs/glip_demo
          or in a sweep beside the others: configs/glip_demo_tuned.py
DATA      as configs/glip_demo_tuned.py
CHIPS     a CPU core for a minute
EXPECTED  docs/results.md
"""

import glip_demo_tuned


def get_config():
    config = glip_demo_tuned.get_config()
    config.model.prompt_table = True
    config.init_only = ("(?!prompt$).*",)
    config.optimizer.update(lr=0.05, lr_mult=(), frozen=("(?!prompt$).*",))
    return config
