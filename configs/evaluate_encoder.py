"""What an image encoder is worth, converted from elsewhere or trained here: few-shot and linear probes.

COMMAND   python -m capvl.evaluate WORKDIR_OR_CONVERTED_FOLDER --config=configs/evaluate_encoder.py
DATA      flowers5 and cifar10, as evaluate_captioner.py; any data set with labels by --config.evals.…
CHIPS     one CPU core for minutes
EXPECTED  docs/results.md
"""

import evaluate_captioner


def get_config():
    config = evaluate_captioner.get_config()
    config.evals = dict(
        flowers=dict(type="fewshot", name="flowers5", shots=(1, 5, 10)),
        cifar=dict(type="fewshot", name="cifar10", shots=(1, 5, 10)),
        flowers_probe=dict(type="linear_probe", name="flowers5"),
        cifar_probe=dict(type="linear_probe", name="cifar10"),
    )
    return config
