"""GIT reads the word in an image by writing it: scene-text recognition (section 3.2).

COMMAND   python -m capvl.main --config=configs/git_text.py --workdir=gs://…/git_text --config.init_from=gs://…/git_b16
DATA      python -m capvl.data.prepare annotated --name=scene_text --format=words --files=words/ --train=mj_st.txt
          --test=iiit5k.txt
CHIPS     a TPU VM, such as v5e:2x4
EXPECTED  not run by us; the paper's GIT: 92.9 on average over six sets
"""

import git_b16


def get_config():
    config = git_b16.get_config()
    config.steps = 40_000
    config.batch_size = 1024
    config.objective = dict(name="git", tasks=("caption",), prompts=(("read", ""),), smoothing=0.1)
    config.data.name = "scene_text"
    config.data.crop = "squash"
    config.optimizer.lr = 2.5e-5
    config.init_from = "runs/git_b16"
    config.init_only = ()
    config.eval_every = 0
    config.evals = dict(words=dict(type="vqa", task="read", split="test", metrics=("word", "exact", "anls")))
    return config
