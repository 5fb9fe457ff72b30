"""CapPa with ViT-L/16, the paper's recipe (arXiv 2306.07915, section 4): 3 B image-text pairs.

COMMAND   python -m capvl.main --config=configs/cappa_l16.py --workdir=gs://…/cappa_l16
          variants: :pa=0 is Cap, :res=384,batch=16k (k is 1,024), :data=coco_captions
DATA      laion400m (python -m capvl.data.prepare tfds --name=laion400m), and a SentencePiece
          model of 32,000 pieces as DATA_DIR/tokenizers/c4_32000.model
CHIPS     a TPU pod slice, such as v5e:16x16 with --config.mesh.replica=-1 --config.mesh.fsdp=16
EXPECTED  planned, not run: 70,000 to 117,000 images/s there, 4.7 GiB a chip (docs/scale.md)
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 366_500
    config.batch_size = 8192
    config.objective = dict(name="cappa", pa=0.75, draw="example")
    config.model = dict(
        encoder="L/16", res=224, decoder_layers=6, vocab=32_000, length=64, dtype="bfloat16", remat="named"
    )
    config.data = dict(
        name="laion400m", tokenizer="{data_dir}/tokenizers/c4_32000.model", crop="squash", threads=8, workers=16
    )
    config.optimizer = dict(
        name="adafactor", lr=1e-3, weight_decay=1e-4, clip_norm=1.0, beta1=0.9, beta2=0.999, momentum_dtype="bfloat16"
    )
    config.schedule = dict(kind="cosine", warmup=10_000)
    config.mesh = dict(replica=1, fsdp=-1, tensor=1)
    config.spike = 10.0
    config.log_every = 50
    config.eval_every = 10_000
    config.checkpoint = dict(every=1000, keep=2, keep_every=50_000)
    config.evals = dict(
        coco=dict(type="perplexity", name="coco_captions", split="val"),
        look=dict(type="image_gain", name="coco_captions", split="val"),
        pets=dict(type="fewshot", name="oxford_iiit_pet"),
        cifar100=dict(type="fewshot", name="cifar100"),
        captions=dict(name="coco_captions", split="val"),
    )
    config.variants = dict(
        pa="objective.pa",
        res="model.res",
        batch="batch_size",
        data="data.name",
        steps="steps",
        lr="optimizer.lr",
        dtype="model.dtype",
        remat="model.remat",
        seed="seed",
    )
    return config
