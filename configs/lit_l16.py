"""LiT on a CapPa encoder (arXiv 2306.07915, section 4.1; 2111.07991): a text tower for ViT-L/16, which is locked.

COMMAND   python -m capvl.main --config=configs/lit_l16.py --config.init_from=gs://…/cappa_l16 --workdir=gs://…/lit_l16
          variants: :init=WORKDIR_OR_CONVERTED_FOLDER, :loss=softmax, :res=384
DATA      laion400m and its tokenizer, as cappa_l16.py
CHIPS     a TPU pod slice, such as v5e:16x16
EXPECTED  not measured by us; docs/evaluation.md has the memory a chip of two B/16 towers on 16 and 256 chips
"""

import cappa_l16


def get_config():
    config = cappa_l16.get_config()
    config.steps = 60_000
    config.batch_size = 16_384
    config.objective = dict(name="contrastive", loss_kind="sigmoid", locked=True)
    config.model = dict(
        encoder="L/16",
        res=224,
        pool="map",
        text="L",
        vocab=32_000,
        length=64,
        dtype="bfloat16",
        remat="named",
    )
    config.init_from = "runs/cappa_l16"
    config.init_only = ("encoder/(?!map/).*",)
    config.evals = dict(
        imagenet=dict(type="zeroshot", name="imagenet2012", split="validation"),
        cifar100=dict(type="zeroshot", name="cifar100"),
        coco=dict(type="retrieval", name="coco_captions", split="val", limit=5000, captions=5),
    )
    config.variants = dict(
        init="init_from",
        loss="objective.loss_kind",
        res="model.res",
        batch="batch_size",
        data="data.name",
        steps="steps",
        lr="optimizer.lr",
        remat="model.remat",
        seed="seed",
    )
    return config
