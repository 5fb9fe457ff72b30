"""X-VLM's text assignment before NLVR2: which of two images does a text belong to, or to neither (arXiv 2111.08276).

Swin-B at 224, each cross-modal layer twice; images of other texts are drawn by their similarity. Rates, batch and
epochs are those of the official configs/NLVR_pretrain_O1.yaml, which an early commit of the repository has (3f6409e).

COMMAND   python -m capvl.main --config=configs/xvlm_nlvr_assign.py --workdir=gs://…/xvlm_assign
              --config.init_from=gs://…/xvlm_4m
          official weights, converted by python -m capvl.convert --from=xvlm --to=capvl FILE.th FOLDER, are a FOLDER
          to begin with, too
DATA      image-text pairs as in pre-training; the tokenizer of xvlm_4m.py
CHIPS     a TPU pod slice, such as v5e:4x4
EXPECTED  not run by us
"""

from ml_collections import ConfigDict

TEXTS = 5_114_489
ENCODERS = ("encoder/.*", "text/.*", "image_head/.*")


def get_config():
    config = ConfigDict()
    config.batch_size = 1024
    config.steps = 2 * TEXTS // 1024
    config.objective = dict(name="text_assignment", among=32)
    config.model = dict(
        encoder="swin-B/4",
        res=224,
        window=7,
        eps=1e-5,
        activation="gelu",
        pixels="clip",
        drop_path=0.1,
        text="B",
        cross_layers=6,
        length=40,
        reads_end=False,
        images=2,
        classes=("first", "second", "neither"),
        head="linear",
        projection=256,
    )
    config.data = dict(
        name="coco*0.11 + visual_genome*0.10 + sbu*0.86 + cc3m*2.9",
        crop="random",
        crop_scale=(0.2, 1.0),
        eval_crop="squash",
        interpolation="bicubic",
        flip=True,
        randaugment="all",
        tokenizer="{data_dir}/tokenizers/xvlm/vocab.txt",
    )
    config.optimizer = dict(
        name="adamw_hf",
        lr=3e-5,
        lr_mult=(("head/.*", 2.0),),
        weight_decay=0.01,
        decay=((r".*norm\d?/scale|.*bias|.*/offsets", 0.0), (".*", 1.0)),
        clip_norm=1.0,
        beta1=0.9,
        beta2=0.98,
        momentum_dtype="float32",
    )
    config.schedule = dict(kind="linear", warmup=config.steps // 10)
    config.init_from = "runs/xvlm_4m"
    config.init_only = ENCODERS
    config.log_every = 100
    config.eval_every = 0
    config.variants = dict(
        res="model.res", encoder="model.encoder", init="init_from", data="data.name", steps="steps", batch="batch_size"
    )
    return config
