"""A two-layer decoder on a locked CapPa encoder, for captions and class names (arXiv 2306.07915, section 4.1).

COMMAND   python -m capvl.main --config=configs/transfer_b16.py --config.init_from=gs://…/cappa_b16 --workdir=gs://…/t_b16
          :locked=false tunes the encoder too
DATA      coco_captions and imagenet2012 through tfds, and the tokenizer of cappa_l16.py
CHIPS     a TPU VM, such as v5e:2x2; not yet run at this size by us
EXPECTED  not measured by us
"""

import cappa_l16


def get_config():
    config = cappa_l16.get_config()
    config.steps = 50_000
    config.batch_size = 512
    config.objective = dict(name="transfer", tasks=("caption", "classify"))
    config.model.encoder = "B/16"
    config.model.decoder_layers = 2
    config.model.vocab = 32_128
    config.data.name = "coco_captions*0.5 + imagenet2012*0.5"
    config.init_from = "runs/cappa_b16"
    config.init_only = ("encoder/.*",)
    config.schedule = dict(kind="cosine", warmup=1000)
    config.mesh = dict(replica=-1, fsdp=1, tensor=1)
    config.evals = dict(
        coco=dict(
            type="captions", name="coco_captions", split="val", count=5000, beams=4, metrics=("bleu", "meteor", "cider")
        ),
        imagenet=dict(type="vqa", task="classify", name="imagenet2012", split="validation", limit=5000),
    )
    config.variants = dict(
        init="init_from", locked="objective.locked", steps="steps", batch="batch_size", lr="optimizer.lr", seed="seed"
    )
    return config
