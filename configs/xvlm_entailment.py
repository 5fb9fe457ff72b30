"""X-VLM fine-tuned on visual entailment: does an image entail a sentence, contradict it, or neither (SNLI-VE)?

The paper has no entailment; the model is that of its tasks, rates and epochs are ours. Statements about an image are
learned four at a time, the image being encoded once.

COMMAND   python -m capvl.main --config=configs/xvlm_entailment.py --workdir=gs://…/xvlm_entailment
              --config.init_from=gs://…/xvlm_4m
DATA      python -m capvl.data.prepare annotated --name=snli_ve --format=snli_ve --files=flickr30k-images/
              --train=snli_ve_train.jsonl --val=snli_ve_dev.jsonl --test=snli_ve_test.jsonl
          (529,527, 17,858 and 17,901 pairs); the tokenizer of xvlm_4m.py
CHIPS     a TPU VM, such as v5e:2x4
EXPECTED  not run by us
"""

import xvlm_nlvr2

PAIRS = 529_527


def get_config():
    config = xvlm_nlvr2.get_config()
    config.batch_size = 64
    config.objective = dict(name="judge", texts=4)
    config.steps = 5 * PAIRS // (4 * 64)
    config.model.update(images=1, classes=("contradiction", "neutral", "entailment"))
    config.data.name = "snli_ve"
    config.schedule.warmup = config.steps // 10
    config.init_from = "runs/xvlm_4m"
    return config
