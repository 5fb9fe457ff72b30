"""X-VLM fine-tuned for retrieval on COCO, or Flickr30k by :data=flickr30k,k=128 (section 4.2, table 1): ITC and ITM.

COMMAND   python -m capvl.main --config=configs/xvlm_retrieval.py --workdir=gs://…/xvlm_retrieval
              --config.init_from=gs://…/xvlm_4m
          converted weights are evaluated by python -m capvl.evaluate xvlm_coco/ --config=configs/xvlm_retrieval.py
DATA      python -m capvl.data.prepare annotated --name=coco --format=karpathy --all=dataset_coco.json --files=coco/
CHIPS     a TPU VM, such as v5e:4x4
EXPECTED  not run by us; the original's README for 4M, R@1/5/10: COCO 80.4/95.5/98.2 of texts, 63.1/85.7/91.6 of images;
          Flickr30k 96.8/99.8/100 and 86.1/97.4/98.7
"""

import xvlm_4m

CAPTIONS = 566_747


def get_config():
    config = xvlm_4m.get_config()
    config.batch_size = 160
    config.steps = 10 * CAPTIONS // 160
    config.objective = dict(name="xvlm", kinds=("pairs",), mlm=0.0, l1=0.0, giou=0.0, same_image=True)
    config.model.update(res=384, window=12, heads=("itc", "itm"), reads_end=True)
    config.data.update(name="coco", crop_scale=(0.5, 1.0))
    config.optimizer.update(lr=3e-5, lr_mult=(), clip_norm=0.0)
    config.schedule = dict(kind="linear", warmup=config.steps // 10)
    config.eval_every = 0
    config.evals = dict(
        retrieval=dict(split="val", rerank=256),
        test=dict(type="retrieval", split="test", rerank=256),
    )
    config.variants.update(data="data.name", k=("evals.retrieval.rerank", "evals.test.rerank"))
    return config
