"""A GLIP of configs/glip_demo.py tuned, all parameters, on scenes with the classes that its training never showed.

COMMAND   python -m capvl.sweep --config=full=configs/glip_demo_tuned.py --config=linear=configs/glip_demo_linear.py
              --config=prompt=configs/glip_demo_prompt.py --data=scenes/held_out_96 --shots=0,1,3,10
              --seeds=3,30,300 --out=runs/shots --config.init_from=runs/glip_demo
DATA      scenes/held_out_96, 2,000 images, made on first use; so many of each class
CHIPS     two CPU cores
EXPECTED  docs/results.md
"""

import glip_demo
from ml_collections import ConfigDict


def get_config():
    config = glip_demo.get_config()
    config.steps = 150
    config.objective.update(order="fixed")
    config.data.name = "scenes/held_out_96"
    config.optimizer.lr = 1e-4
    config.schedule.warmup = 10
    config.checkpoint.every = 150
    config.eval_every = 50  # The best of three is tested.
    config.watch = dict(metric="val/AP", test=("final",))
    config.evals = dict(
        val=dict(type="detection", split="val"),
        final=ConfigDict(dict(glip_demo.get_config().evals.apart)),
    )
    config.variants.update(shots="data.shots", shots_seed="data.shots_seed")
    return config
