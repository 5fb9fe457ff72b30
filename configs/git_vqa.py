"""GIT fine-tuned to answer questions by writing: VQAv2, and TextVQA, VizWiz, GQA by :data= (section 3.2).

The question stands in front, only the answer and its end are learned. Images keep their aspect: short side 480 (420 for
GIT_L's patches of 14), long side at most 640 (560).

COMMAND   python -m capvl.main --config=configs/git_vqa.py --workdir=gs://…/git_vqa --config.init_from=gs://…/git_b16
          for GIT_L: :encoder=L/14,res=420,max_side=560
DATA      python -m capvl.data.prepare annotated --name=vqa --format=vqa --files=coco/
          --train=OpenEnded_train.json,annotations_train.json --val=OpenEnded_val.json,annotations_val.json
          (formats textvqa, vizwiz, gqa)
CHIPS     a TPU pod slice, such as v5e:4x4
EXPECTED  not run by us; the paper's GIT_B: 72.7 on VQAv2 test-dev, 18.8 on TextVQA. Rates and epochs are ours
"""

import git_b16


def get_config():
    config = git_b16.get_config()
    config.steps = 34_600  # 20 epochs of 443,757 questions, five of an image at a time
    config.batch_size = 256
    config.objective = dict(name="git", tasks=("answer",), smoothing=0.1)
    config.model.res = 480
    config.model.max_side = 640
    config.data.name = "vqa"
    config.optimizer.lr = 2.5e-5
    config.schedule = dict(kind="cosine", warmup=500)
    config.init_from = "runs/git_b16"
    config.init_only = ()
    config.eval_every = 0
    config.evals = dict(
        answers=dict(
            type="vqa", metrics=("vqa", "exact", "anls"), prior="train", beams=4, length_penalty=0.6, rule="official"
        ),
        server=dict(
            type="vqa",
            split="val",
            metrics=("vqa",),
            beams=4,
            length_penalty=0.6,
            rule="official",
            submission="vqa",
        ),
    )
    config.variants.update(res="model.res", max_side="model.max_side", encoder="model.encoder")
    return config
