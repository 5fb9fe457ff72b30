"""GIT fine-tuned to caption: COCO's Karpathy split, and nocaps, TextCaps, VizWiz, Flickr30K by :data= (section 3.2).

COMMAND   python -m capvl.main --config=configs/git_coco.py --workdir=gs://…/git_coco --config.init_from=gs://…/git_b16
          :data=textcaps, :data=vizwiz, :data=flickr30k; converted weights are evaluated by
          python -m capvl.evaluate git_b_coco/ --config=configs/git_coco.py
DATA      python -m capvl.data.prepare annotated --name=coco --format=karpathy --all=dataset_coco.json --files=coco/
          (formats coco for nocaps and VizWiz, textcaps, karpathy for Flickr30K); BERT's vocab.txt as in git_b16.py
CHIPS     a TPU VM, such as v5e:2x4
EXPECTED  not run by us; the paper's GIT_B: CIDEr 131.4 on COCO, 64.9 on TextCaps. Rates and epochs are ours: the
          paper's table is a picture
"""

import git_b16


def get_config():
    config = git_b16.get_config()
    config.steps = 2200  # 10 epochs of 113,287 images
    config.batch_size = 512
    config.objective = dict(name="git", tasks=("caption",), smoothing=0.1)
    config.data.name = "coco"
    config.optimizer.lr = 2.5e-5
    config.schedule = dict(kind="cosine", warmup=200)
    config.init_from = "runs/git_b16"
    config.init_only = ()
    config.eval_every = 0
    config.evals = dict(
        captions=dict(
            split="test",
            count=0,
            beams=4,
            length_penalty=0.6,
            rule="official",
            metrics=("bleu", "meteor", "rouge", "cider"),
            submission="coco",
        ),
    )
    config.variants.update(res="model.res", encoder="model.encoder")
    return config
