"""GLIP-T (arXiv 2112.03857): Swin-T, BERT and six blocks of deep fusion, trained on boxes of classes and of phrases.

COMMAND   python -m capvl.main --config=configs/glip_t.py --workdir=gs://…/glip_t
              --config.init_from="gs://…/swin_t + gs://…/bert_base"
              --config.init_only="('encoder/.*', 'text/.*')"
          the paper's variants (table 1):
          (A) :data=objects365,fusion=none    (B) :data=objects365    (C) :data="objects365 + goldg"
DATA      0.66 M images of Objects365, 0.8 M of GoldG (Flickr30k Entities, and GQA and Visual Genome as MDETR mixed
          them), 4 M captions with a teacher's boxes, all by `python -m capvl.data.prepare` (docs/glip.md); BERT's
          vocab.txt as DATA_DIR/tokenizers/bert_uncased.txt
CHIPS     a TPU pod slice: docs/performance.md has plans for v5e:8x8 and v5p
EXPECTED  not run by us. The paper, zero-shot AP on COCO / LVIS minival: (A) 42.9 / 18.5, (B) 44.9 / 17.8,
          (C) 46.7 / 24.9, T 46.3 / 26.0
"""

from ml_collections import ConfigDict

IMAGES = 5_460_000
BERT, BIAS = "text/.*", ".*(bias(_text)?|offsets)"


def get_config():
    config = ConfigDict()
    config.batch_size = 64
    config.steps = 30 * IMAGES // config.batch_size
    # Long images and tall ones, of three sizes, in turn. The paper draws the short side from 480 to 800 by 80.
    config.objective = dict(
        name="glip",
        sizes=((800, 1344), (1344, 800), (640, 1088), (1088, 640), (480, 800), (800, 480)),
        slots=100,
    )
    config.model = dict(
        encoder="swin-T/4",
        res=800,
        max_side=1333,
        window=7,
        eps=1e-5,
        activation="gelu",
        pixels="imagenet",
        drop_path=0.2,
        drop_block=0.3,
        text="B",
        length=256,
        width=256,
        blocks=6,
        fusion="both",
        remat="full",
    )
    config.data = dict(
        name="objects365*0.66 + goldg*0.8 + cap4m*4.0",
        interpolation="bilinear",
        flip=True,
        tokenizer="{data_dir}/tokenizers/bert_uncased.txt",
        threads=8,
        workers=16,
    )
    # What has "bias" in the official names learns twice as fast and doesn't decay: tables of relative positions too.
    config.optimizer = dict(
        name="adamw_hf",
        lr=1e-4,
        lr_mult=((f"text/{BIAS}", 0.2), (BERT, 0.1), (BIAS, 2.0)),
        weight_decay=1e-4,
        decay=((BIAS, 0.0), (".*", 1.0)),
        clip_norm=1.0,
        momentum_dtype="float32",
        ema=0.999,
    )
    config.schedule = dict(kind="steps", warmup=2000, warmup_from=0.001)
    config.log_every = 50
    config.checkpoint = dict(every=2000, keep_every=50_000)
    config.eval_every = 50_000
    config.evals = dict(
        coco=dict(type="detection", name="coco", split="val"),
        flickr30k=dict(type="phrase_boxes", name="flickr30k_entities", split="val"),
    )
    config.variants = dict(
        data="data.name",
        fusion="model.fusion",
        offsets="model.offsets",
        steps="steps",
        batch="batch_size",
        lr="optimizer.lr",
        remat="model.remat",
        init="init_from",
        seed="seed",
    )
    return config
