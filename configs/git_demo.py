"""GIT from scratch on the embedded data set: captions, and answers to questions, of which one is what a word says.

COMMAND   python -m capvl.main --config=configs/git_demo.py
DATA      scenes/few, 20,000 images of 64 px with 2 or 3 large objects, made on first use
CHIPS     2 CPU cores
EXPECTED  docs/results.md
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 3400
    config.batch_size = 16
    config.objective = dict(
        name="git",
        tasks=("caption", "answer", "answer", "answer"),
        prompts=(("read", "what does it say"),),
        smoothing=0.1,
        texts=4,
    )
    config.model = dict(
        encoder="w128d2h4m512/8",
        stem="conv",
        layer_scale=0.05,
        pool="mean",
        class_position=False,
        res=64,
        pixels="half",
        text="w128d2h4m512",
        norm="pre",
        vocab=256,
        start=2,
        length=24,
        text_positions=24,
        dropout=0.0,
        dtype="float32",
        unroll=True,
    )
    config.data = dict(name="scenes/few", crop="center", tokenizer="{data_dir}/scenes/wordpiece.txt")
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
    config.log_every = 200
    config.checkpoint = dict(every=1000)
    config.evals = dict(
        answers=dict(type="vqa", prior="train"),
        facts=dict(type="hallucination"),
        captions=dict(count=24),
    )
    config.variants = dict(
        steps="steps",
        batch="batch_size",
        lr="optimizer.lr",
        fusion="model.fusion",
        norm="model.norm",
        kind="objective.kind",
        blind="objective.blind",
        init="init_from",
        texts="objective.texts",
        seed="seed",
    )
    return config
