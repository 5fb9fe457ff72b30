"""GIT_B pre-trained by captioning (arXiv 2205.14100, section 3): CLIP's ViT-B/16 and six layers of BERT's form.

COMMAND   python -m capvl.main --config=configs/git_b16.py --workdir=gs://…/git_b16 --config.init_from=clip_b16
          :init=WORKDIR_OR_FOLDER takes the encoder from there; :fusion=cross and :kind=masked for comparison
DATA      "pairs", 10 M image-text pairs prepared from tars (COCO, SBU, CC3M, VG in the paper), and BERT's vocab.txt as
          DATA_DIR/tokenizers/bert_uncased.txt; :data='pairs*0.9 + lm1b*0.1' mixes in texts without images
CHIPS     a TPU pod slice, such as v5e:8x8
EXPECTED  planned, not run (docs/performance.md); the paper's GIT_B has 131.4 CIDEr on COCO after fine-tuning
"""

from ml_collections import ConfigDict

ENCODER = ("encoder/.*",)


def get_config():
    config = ConfigDict()
    config.steps = 73_000  # 30 epochs of 10 M pairs
    config.batch_size = 4096
    config.objective = dict(name="git", tasks=("caption",), smoothing=0.1, sides=(160, 176, 192, 208, 224))
    config.model = dict(
        encoder="B/16",
        res=224,
        text="w768d6h12m3072",
        vocab=30_522,
        start=101,
        length=40,
        dropout=0.1,
        dtype="bfloat16",
        remat="named",
    )
    config.data = dict(
        name="pairs",
        tokenizer="{data_dir}/tokenizers/bert_uncased.txt",
        crop="random",
        crop_scale=(0.8, 1.0),
        crop_ratio=(1.0, 1.0),
        interpolation="bicubic",
        threads=8,
        workers=16,
    )
    # 5e-5, the encoder 1e-5; AdamW's decay of 0.01 times the rate, since ours isn't multiplied by it.
    config.optimizer = dict(
        name="adamw",
        lr=5e-5,
        lr_mult=(("encoder/.*", 0.2),),
        weight_decay=5e-7,
        decay=(("encoder/.*kernel", 0.2), (".*(kernel|cross_kv|tokens)", 1.0)),
        clip_norm=1.0,
        beta2=0.999,
        momentum_dtype="float32",
    )
    config.schedule = dict(kind="cosine", warmup=500)
    config.mesh = dict(replica=-1, fsdp=1, tensor=1)
    config.init_from = "clip_b16"
    config.init_only = ENCODER
    config.log_every = 50
    config.eval_every = 10_000
    config.checkpoint = dict(every=1000, keep=2)
    config.evals = dict(
        coco=dict(type="perplexity", name="coco_captions", split="val", modes=("cap",), limit=5000),
        captions=dict(name="coco_captions", split="val", beams=4, length_penalty=0.6, rule="official"),
    )
    config.variants = dict(
        init="init_from",
        data="data.name",
        fusion="model.fusion",
        norm="model.norm",
        kind="objective.kind",
        batch="batch_size",
        steps="steps",
        lr="optimizer.lr",
        remat="model.remat",
        seed="seed",
    )
    return config
