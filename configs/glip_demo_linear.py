"""The heads alone of a GLIP of configs/glip_demo.py tuned; configs/glip_demo_tuned.py tells the rest."""

import glip_demo_tuned


def get_config():
    config = glip_demo_tuned.get_config()
    config.optimizer.update(lr_mult=(), frozen=("(encoder|pyramid|text|tower)/.*",))
    return config
