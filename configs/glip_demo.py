"""GLIP from scratch on the embedded data set."""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 2000
    config.batch_size = 8
    config.objective = dict(name="glip", texts=("phrases",), slots=8)
    config.model = dict(
        encoder="w96d2h3m384/8",
        stem="conv",
        layer_scale=0.05,
        pad_windows=False,
        level_norms=False,
        res=128,
        max_side=128,
        pixels="half",
        width=64,
        blocks=2,
        groups=8,
        fusion="both",
        fusion_width=128,
        fusion_heads=4,
        text="w96d2h3m384",
        vocab=256,
        length=48,
        text_positions=48,
        dropout=0.0,
        dtype="float32",
        unroll=True,
    )
    config.data = dict(name="scenes/128", tokenizer="{data_dir}/scenes/wordpiece.txt")
    config.optimizer = dict(name="adamw", lr=1e-3, weight_decay=1e-4, beta2=0.98, momentum_dtype="float32")
    config.schedule = dict(kind="cosine", warmup=100)
    config.log_every = 20
    config.checkpoint = dict(every=1000)
    config.evals = dict()
    config.variants = dict(
        steps="steps",
        batch="batch_size",
        lr="optimizer.lr",
        seed="seed",
        data="data.name",
        fusion="model.fusion",
        offsets="model.offsets",
    )
    return config
