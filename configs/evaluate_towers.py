"""What a two-tower model is worth on real data: zero-shot classes, retrieval, compositionality, entailment.

COMMAND   python -m capvl.evaluate WORKDIR_OR_CONVERTED_FOLDER --config=configs/evaluate_towers.py
DATA      as evaluate_captioner.py
CHIPS     one CPU core for minutes
EXPECTED  docs/results.md
"""

import evaluate_captioner


def get_config():
    config = evaluate_captioner.get_config()
    kept = {name: config.evals[name] for name in ("sugarcrepe", "order", "entailment")}
    config.evals = dict(
        retrieval=dict(captions=5),
        flowers=dict(type="zeroshot", name="flowers5"),
        cifar=dict(type="zeroshot", name="cifar10"),
        imagenet=dict(type="zeroshot", name="imagenet_sample", classes="{data_dir}/tests/imagenet_classes.json"),
        **kept,
    )
    return config
