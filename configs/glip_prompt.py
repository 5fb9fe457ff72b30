"""Prompt tuning of GLIP: vectors that are added to the text's states learn, nothing else (arXiv 2112.03857, 4.4).

COMMAND   python -m capvl.main --config=configs/glip_prompt.py:data=aquarium --config.init_from=gs://…/glip_t
          the official code's four ways: v2 is this one; v1 the BERT alone, v3 BERT and heads, v4 vectors and heads:
          --config.optimizer.frozen, as docs/glip.md has it
DATA      as configs/glip_odinw.py
CHIPS     a TPU VM, or a GPU
EXPECTED  not run by us. The paper: close to tuning everything, with deep fusion (figure 6)
"""

import glip_odinw


def get_config():
    config = glip_odinw.get_config()
    config.model.prompt_table = True
    config.init_only = ("(?!prompt$).*",)
    config.optimizer.update(lr=0.05, lr_mult=(), weight_decay=0.25, frozen=("(?!prompt$).*",))
    return config
