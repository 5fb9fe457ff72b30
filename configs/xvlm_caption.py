"""X-VLM fine-tuned to caption COCO (arXiv 2111.08276, section 4.2), in the official recipe's way: Swin-B at 384.

COMMAND   python -m capvl.main --config=configs/xvlm_caption.py --workdir=gs://…/xvlm_caption
              --config.init_from=gs://…/xvlm_4m
          the official recipe has two epochs of language modelling at 224 before:
          :res=224,window=7,lr=3e-5,steps=4400 --config.objective.smoothing=0
          converted weights are evaluated by python -m capvl.evaluate xvlm_coco/ --config=configs/xvlm_caption.py
DATA      python -m capvl.data.prepare annotated --name=coco --format=karpathy --all=dataset_coco.json --files=coco/
CHIPS     a TPU pod slice, such as v5e:4x4
EXPECTED  not run by us; the original's README: BLEU@4 39.8 and CIDEr 133.1 (4M), 39.9 and 134.0 (16M)
"""

import xvlm_4m

CAPTIONS = 566_747


def get_config():
    config = xvlm_4m.get_config()
    config.batch_size = 256
    config.steps = 5 * CAPTIONS // 256
    config.objective = dict(name="xvlm_caption", smoothing=0.1)
    config.model.update(res=384, window=12, reads_end=True, length=26, words="a picture of")
    config.data.update(name="coco", crop_scale=(0.5, 1.0))
    config.optimizer.update(lr=1e-5, lr_mult=(), clip_norm=0.0, decay=((".*(bias|scale|offsets)", 0.0), (".*", 1.0)))
    config.schedule = dict(kind="linear", warmup=config.steps // 10)
    config.init_from = "runs/xvlm_4m"
    config.eval_every = 0
    config.evals = dict(
        captions=dict(
            split="test",
            count=0,
            beams=3,
            rule="hugging_face_whole",
            min_tokens=1,
            metrics=("bleu", "meteor", "rouge", "cider"),
            submission="coco",
        ),
    )
    config.variants = dict(
        steps="steps",
        batch="batch_size",
        lr="optimizer.lr",
        res="model.res",
        window="model.window",
        init="init_from",
        seed="seed",
    )
    return config
