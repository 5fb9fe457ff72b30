"""CapPa on 5,673 real photos with five captions each, sized for what two CPU cores can learn.

COMMAND   python -m capvl.main --config=configs/cappa_flickr8k.py
DATA      flickr8k, flowers5 and cifar10, prepared from tar shards (docs/results.md has the commands)
CHIPS     one CPU core for 15 minutes
EXPECTED  docs/results.md
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 1000
    config.batch_size = 64
    config.objective = dict(name="cappa", pa=0.75, draw="stratified")
    config.model = dict(
        encoder="w128d4h4m512/8", res=64, decoder_layers=2, vocab=2000, length=24, dtype="float32", unroll=True
    )
    config.data = dict(
        name="flickr8k", tokenizer="{data_dir}/flickr8k/tokenizer_2000.model", crop_scale=(0.4, 1.0), flip=True
    )
    config.optimizer = dict(name="adafactor", lr=2e-3, weight_decay=1e-4, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup=100)
    config.log_every = 50
    config.checkpoint = dict(every=500)
    config.evals = dict(
        perplexity=dict(),
        image_gain=dict(),
        flowers=dict(type="fewshot", name="flowers5", shots=(10,)),
        cifar=dict(type="fewshot", name="cifar10", shots=(10,)),
        flowers_pixels=dict(type="fewshot", name="flowers5", shots=(10,), features="pixels"),
        cifar_pixels=dict(type="fewshot", name="cifar10", shots=(10,), features="pixels"),
        captions=dict(count=24),
    )
    config.variants = dict(
        pa="objective.pa", seed="seed", res="model.res", batch="batch_size", steps="steps", lr="optimizer.lr"
    )
    return config
