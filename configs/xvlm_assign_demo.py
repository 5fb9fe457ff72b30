"""Text assignment from scratch on the embedded data set: which of two scenes does a caption belong to, or to neither?

COMMAND   python -m capvl.main --config=configs/xvlm_assign_demo.py
DATA      scenes/few, 20,000 images of 64 px with captions, made on first use
CHIPS     2 CPU cores
EXPECTED  not measured yet; chance is a third
"""

import xvlm_nlvr2_demo


def get_config():
    config = xvlm_nlvr2_demo.get_config()
    config.objective = dict(name="text_assignment", among=16)
    config.model.update(classes=("first", "second", "neither"), head="linear", projection=64)
    config.data.name = "scenes/few"
    config.evals = dict()
    return config
