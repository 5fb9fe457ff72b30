"""GIT on embedded clips: what moves, and where to; begins with the weights of the image demo.

COMMAND   python -m capvl.main --config=configs/git_demo.py && python -m capvl.main --config=configs/git_video_demo.py
DATA      scenes/clips_few, 4,000 clips of 6 frames of 64 px, made on first use; the model reads 3
CHIPS     2 CPU cores
EXPECTED  docs/results.md
"""

import git_demo


def get_config():
    config = git_demo.get_config()
    config.steps = 800
    config.batch_size = 16
    config.model.frames = 3
    config.data.name = "scenes/clips_few"
    config.optimizer.lr = 5e-4
    config.schedule = dict(kind="cosine", warmup=50)
    config.init_from = "runs/git_demo"
    config.init_only = ("(encoder|decoder)/.*",)
    config.evals = dict(
        answers=dict(type="vqa", prior="train"),
        moves=dict(type="vqa", task="caption", prior="train"),
        captions=dict(count=12),
    )
    return config
