"""GIT on 5,673 real photos: its encoder from CapPa's, or fresh.

COMMAND   python -m capvl.main --config=configs/git_flickr8k.py after configs/cappa_flickr8k.py; a fresh encoder: :init=
          for comparison: :fusion=cross (cross-attention), :kind=masked,text_positions=25 (masked language modelling)
DATA      flickr8k and its tokenizer as in cappa_flickr8k.py (docs/results.md has the commands)
CHIPS     one CPU core for ten minutes
EXPECTED  docs/results.md
"""

import cappa_flickr8k


def get_config():
    config = cappa_flickr8k.get_config()
    config.steps = 500
    config.batch_size = 32
    config.objective = dict(name="git", tasks=("caption",), smoothing=0.1, texts=4, mask_id=2)
    config.model = dict(
        encoder="w128d4h4m512/8",
        res=64,
        pool="mean",
        pre_norm=False,
        class_position=False,
        activation="gelu_tanh",
        eps=1e-6,
        pixels="half",
        text="w128d2h4m512",
        norm="pre",
        vocab=2000,
        start=0,
        length=24,
        text_positions=24,
        dropout=0.0,
        dtype="float32",
        unroll=True,
    )
    config.optimizer = dict(
        name="adamw",
        lr=1e-3,
        lr_mult=(("encoder/.*", 0.5),),
        weight_decay=1e-5,
        clip_norm=1.0,
        beta2=0.98,
        momentum_dtype="float32",
    )
    config.schedule = dict(kind="cosine", warmup=50)
    config.init_from = "runs/cappa_flickr8k"
    config.init_only = ("encoder/.*",)
    config.evals = dict(
        perplexity=dict(modes=("cap",)),
        image_gain=dict(modes=("cap",)),
        captions=dict(count=0, beams=3, length_penalty=0.6, metrics=("bleu", "rouge", "cider")),
    )
    config.variants.update(
        init="init_from",
        only="init_only",
        fusion="model.fusion",
        norm="model.norm",
        kind="objective.kind",
        text_positions="model.text_positions",
    )
    return config
