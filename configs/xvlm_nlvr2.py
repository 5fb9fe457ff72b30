"""X-VLM fine-tuned on NLVR2: is a statement true of two images (arXiv 2111.08276; official NLVR.yaml)? Swin-B at 384.

COMMAND   python -m capvl.main --config=configs/xvlm_nlvr2.py --workdir=gs://…/xvlm_nlvr2
              --config.init_from=gs://…/xvlm_assign
          :init=FOLDER of a pre-trained X-VLM leaves text assignment out
DATA      python -m capvl.data.prepare annotated --name=nlvr2 --format=nlvr2 --files=images/ --train=train.json
              --val=dev.json --test=test1.json; the tokenizer of xvlm_4m.py
CHIPS     a TPU VM, such as v5e:2x4: 10 pairs a chip
EXPECTED  not run by us; the official README: 84.16 on dev and 84.21 on test-P (4M), 84.41 and 84.76 (16M)
"""

import xvlm_nlvr_assign

SENTENCES = 86_000  # About.


def get_config():
    config = xvlm_nlvr_assign.get_config()
    config.batch_size = 80
    config.steps = 10 * SENTENCES // 80
    config.objective = dict(name="judge")
    config.model.update(
        res=384, window=12, reads_end=True, classes=("False", "True"), head="mlp", projection=0, length=40
    )
    config.data.update(name="nlvr2", crop_scale=(0.5, 1.0))
    config.optimizer.clip_norm = 0.0
    config.optimizer.decay = (("head/norm/scale", 1.0), *config.optimizer.decay)  # As the official code has it.
    config.schedule.warmup = config.steps // 10
    config.init_from = "runs/xvlm_assign"
    config.init_only = ("encoder/.*", "text/.*")
    config.evals = dict(judge=dict(split="val"), test=dict(type="judge", split="test"))
    return config
