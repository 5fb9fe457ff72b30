"""Prompt tuning of a GLIP of configs/glip_demo.py; configs/glip_demo_tuned.py tells the rest."""

import glip_demo_tuned


def get_config():
    config = glip_demo_tuned.get_config()
    config.model.prompt_table = True
    config.init_only = ("(?!prompt$).*",)
    config.optimizer.update(lr=0.05, lr_mult=(), frozen=("(?!prompt$).*",))
    return config
