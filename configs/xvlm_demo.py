"""X-VLM from scratch on the embedded data set: scenes with captions, and their objects with boxes and phrases.

COMMAND   python -m capvl.main --config=configs/xvlm_demo.py
DATA      scenes/few, 20,000 images of 64 px with 2 or 3 large objects, made on first use
CHIPS     one CPU core for 20 minutes, two for less
EXPECTED  docs/results.md
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 2000
    config.batch_size = 16
    config.objective = dict(name="xvlm", share=0.5, group=(4, 8), slots=3, captions=False, masks=4)
    config.model = dict(
        encoder="w128d2h4m512/8",
        stem="conv",
        layer_scale=0.05,
        res=64,
        text="w128d4h4m512",
        cross_layers=2,
        vocab=256,
        length=24,
        text_positions=24,
        dropout=0.0,
        projection=64,
        dtype="float32",
        unroll=True,
    )
    config.data = dict(
        name="pairs=scenes/few + regions=scenes/few", crop="center", tokenizer="{data_dir}/scenes/wordpiece.txt"
    )
    config.optimizer = dict(
        name="adamw",
        lr=1e-3,
        lr_mult=(("encoder/(stem|positions).*", 3.0), ("encoder/blocks.*", 0.3)),
        weight_decay=1e-4,
        clip_norm=1.0,
        beta2=0.98,
        momentum_dtype="float32",
    )
    config.schedule = dict(kind="cosine", warmup=100)
    config.log_every = 100
    config.checkpoint = dict(every=1000)
    config.evals = dict(
        retrieval=dict(name="scenes/few", captions=1, rerank=16),
        grounding=dict(name="scenes/few"),
        foils=dict(type="compositionality", format="scenes", images="scenes/few:val"),
    )
    config.variants = dict(
        steps="steps",
        batch="batch_size",
        lr="optimizer.lr",
        seed="seed",
        data="data.name",
        heads="model.heads",
        kinds="objective.kinds",
        blind="objective.blind",
    )
    return config
