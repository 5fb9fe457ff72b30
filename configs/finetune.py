"""Fine-tuning of a whole encoder at a higher resolution, with resized positions.

COMMAND   python -m capvl.main --config=configs/finetune.py --config.init_from=WORKDIR_OR_CONVERTED_FOLDER
DATA      scenes/demo at 64 px, seen at 96 px; or any data set with labels
CHIPS     2 CPU cores
EXPECTED  docs/results.md
"""

import probe_linear


def get_config():
    config = probe_linear.get_config()
    config.steps = 300
    config.batch_size = 32
    config.objective.locked = False
    config.model.heads = 1
    config.model.res = 96
    config.optimizer = dict(
        name="adamw", lr=1e-3, weight_decay=1e-4, clip_norm=1.0, lr_mult=(("encoder/.*", 0.3), (".*", 1.0))
    )
    config.evals = dict(probe=dict())
    config.variants = dict(
        init="init_from",
        encoder="model.encoder",
        res="model.res",
        data="data.name",
        classes="model.classes",
        steps="steps",
        batch="batch_size",
        lr="optimizer.lr",
        seed="seed",
    )
    return config
