"""Captions of real clips: GIT as git_flickr8k.py leaves it, on six frames of each of a handful of MSVD clips.

So few clips teach no video model; the recipe shows the way from clips to captions. `--untrained` of capvl.evaluate
gives what the image model alone says of the frames.

COMMAND   python -m capvl.main --config=configs/git_msvd.py after configs/git_flickr8k.py
DATA      python -m capvl.data.prepare tars --name=msvd_clips --frames=16 --train=clips/TRAIN.tar --val=clips/VAL.tar
CHIPS     one CPU core for a minute
EXPECTED  docs/results.md
"""

import git_flickr8k


def get_config():
    config = git_flickr8k.get_config()
    config.steps = 60
    config.batch_size = 4
    config.objective.texts = 0
    config.model.frames = 6
    config.data.name = "msvd_clips"
    config.optimizer.lr = 1e-4
    config.schedule.warmup = 10
    config.init_from = "runs/git_flickr8k"
    config.init_only = ("(encoder|decoder)/.*",)
    config.evals = dict(captions=dict(count=8, beams=3, length_penalty=0.6, metrics=("bleu", "rouge", "cider")))
    return config
