"""CapPa on the embedded data set of procedural scenes: a few minutes on 2 CPU cores.

COMMAND   python -m capvl.main --config=configs/cappa_demo.py
DATA      scenes/demo, 6,000 images of 64 px, made on first use
CHIPS     2 CPU cores
EXPECTED  captions that name most objects
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 600
    config.batch_size = 32
    config.objective = dict(name="cappa", pa=0.75, draw="stratified")
    config.model = dict(
        encoder="w128d4h4m512/8", res=64, decoder_layers=2, vocab=128, length=32, dtype="float32", unroll=True
    )
    config.data = dict(name="scenes/demo", crop="center")
    config.optimizer = dict(name="adafactor", lr=2e-3, weight_decay=1e-4, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup=50)
    config.log_every = 50
    config.checkpoint = dict(every=300)
    config.evals = dict(
        perplexity=dict(),
        image_gain=dict(),
        fewshot=dict(name="scenes/demo", shots=(10,)),
        captions=dict(count=24),
    )
    config.variants = dict(pa="objective.pa", res="model.res", batch="batch_size", steps="steps", lr="optimizer.lr")
    return config
