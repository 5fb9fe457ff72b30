"""X-VLM fine-tuned to caption COCO (arXiv 2111.08276, section 4.2; the official recipe): Swin-B at 384.

COMMAND   python -m capvl.main --config=configs/xvlm_caption.py --workdir=gs://…/xvlm_caption
              --config.init_from=gs://…/xvlm_4m
          The official recipe has two epochs of language modelling at 224 before:
          :res=224,window=7,lr=3e-5,steps=4400 --config.objective.smoothing=0
          Converted weights are evaluated by python -m capvl.evaluate xvlm_coco/ --config=configs/xvlm_caption.py
DATA      python -m capvl.data.prepare annotated --name=coco --format=karpathy --all=dataset_coco.json --files=coco/
          BERT's vocab.txt: tokenizers/bert_uncased.txt in $TFDS_DATA_DIR
CHIPS     a TPU VM, such as v5e:2x4
EXPECTED  not run by us; the official README has BLEU@4 39.8 and CIDEr 133.1 (4M), 39.9 and 134.0 (16M)
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.batch_size = 256
    config.steps = 11_000  # 5 epochs of 566,747 captions
    config.objective = dict(name="xvlm_caption", smoothing=0.1)
    config.model = dict(
        encoder="swin-B/4",
        res=384,
        window=12,
        eps=1e-5,
        activation="gelu",
        pixels="clip",
        drop_path=0.1,
        text="B",
        cross_layers=6,
        length=26,
        words="a picture of",
    )
    config.data = dict(
        name="coco",
        crop="random",
        crop_scale=(0.5, 1.0),
        eval_crop="squash",
        interpolation="bicubic",
        flip=True,
        randaugment="all",
        tokenizer="{data_dir}/tokenizers/bert_uncased.txt",
    )
    config.optimizer = dict(
        name="adamw_hf",
        lr=1e-5,
        weight_decay=0.01,
        decay=((".*(bias|norm[0-9]?/scale).*|.*/offsets", 0.0), (".*", 1.0)),
        clip_norm=0.0,
        beta2=0.98,
        momentum_dtype="float32",
    )
    config.schedule = dict(kind="linear", warmup=1100)
    config.init_from = "runs/xvlm_4m"
    config.log_every = 100
    config.eval_every = 0
    config.evals = dict(
        captions=dict(
            split="test",
            count=0,
            beams=3,
            rule="hugging_face_whole",
            min_tokens=1,
            metrics=("bleu", "meteor", "rouge", "cider"),
            submission="coco",
        ),
    )
    config.variants = dict(
        res="model.res", window="model.window", encoder="model.encoder", lr="optimizer.lr", steps="steps", seed="seed"
    )
    return config
