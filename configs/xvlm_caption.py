"""X-VLM fine-tuned to caption COCO (arXiv 2111.08276, section 4.2; the official Captioning.yaml): Swin-B at 384.

COMMAND   first two epochs of 224 as its domain pre-training, then the fine-tuning:
          python -m capvl.main --config=configs/xvlm_caption.py:stage=domain --workdir=gs://…/xvlm_domain
              --config.init_from=gs://…/xvlm_4m
          python -m capvl.main --config=configs/xvlm_caption.py --workdir=gs://…/xvlm_caption
              --config.init_from=gs://…/xvlm_domain
          converted weights are evaluated by python -m capvl.evaluate xvlm_coco/ --config=configs/xvlm_caption.py
DATA      python -m capvl.data.prepare annotated --name=coco --format=karpathy --all=dataset_coco.json --files=coco/;
          BERT's vocab.txt as tokenizers/bert_uncased.txt
CHIPS     a TPU VM, such as v5e:2x4
EXPECTED  not run by us; the official README: BLEU@4 39.8 and CIDEr 133.1 (4M), 39.9 and 134.0 (16M)
"""

from ml_collections import ConfigDict

IMAGES = 113_287
CAPTIONS = 566_747


def get_config():
    config = ConfigDict()
    config.batch_size = 256
    config.steps = 5 * CAPTIONS // 256
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
        interpolation="bicubic",
        flip=True,
        randaugment="full",
        tokenizer="{data_dir}/tokenizers/bert_uncased.txt",
    )
    config.optimizer = dict(
        name="adamw_hf",
        lr=1e-5,
        weight_decay=0.01,
        decay=((r".*norm\d?/scale|.*_norm/scale|.*bias.*", 0.0), (".*", 1.0)),
        clip_norm=0.0,
        beta1=0.9,
        beta2=0.98,
        momentum_dtype="float32",
    )
    config.schedule = dict(kind="linear", warmup=config.steps // 10)
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
    config.variants = dict(res="model.res", encoder="model.encoder", init="init_from", steps="steps", seed="seed")
    return config
