"""Statements about two scenes, true or false, from scratch on the embedded data set; or after text assignment.

COMMAND   python -m capvl.main --config=configs/xvlm_nlvr2_demo.py
          text assignment before it: --config=configs/xvlm_assign_demo.py, then here :init=runs/xvlm_assign_demo
DATA      scenes/pairs, 12,000 pairs of images of 64 px, made on first use
CHIPS     2 CPU cores
EXPECTED  not measured yet; blind and majority are 0.5 by construction
"""

import xvlm_demo


def get_config():
    config = xvlm_demo.get_config()
    config.steps = 3000
    config.batch_size = 32
    config.objective = dict(name="judge")
    config.model.update(vocab=300, images=2, classes=("False", "True"), projection=0)
    config.data = dict(name="scenes/pairs", crop="center", tokenizer="{data_dir}/scenes/statements.txt")
    config.evals = dict(judge=dict())
    config.init_only = ("encoder/.*", "text/.*")
    config.variants = dict(steps="steps", batch="batch_size", lr="optimizer.lr", seed="seed", init="init_from")
    return config
