"""Linear probe of an encoder of your own: nine settings of SGD side by side, and L-BFGS beside them.

COMMAND   python -m capvl.main --config=configs/probe_linear.py --config.init_from=WORKDIR_OR_CONVERTED_FOLDER
          :pool=map trains a MAP head with each classifier; :data=cifar10,classes=10 is another data set;
          the model must be that of the encoder: :encoder=B/16,res=224
DATA      scenes/demo, 6,000 images of 64 px, made on first use; or any data set with labels
CHIPS     2 CPU cores
EXPECTED  docs/results.md
"""

from ml_collections import ConfigDict

RATES = (0.01, 0.1, 1.0)
DECAYS = (0.0, 1e-4, 1e-2)


def get_config():
    config = ConfigDict()
    config.steps = 400
    config.batch_size = 128
    config.objective = dict(name="probe", locked=True)
    config.model = dict(
        encoder="w128d4h4m512/8",
        res=64,
        classes=9,
        heads=len(RATES) * len(DECAYS),
        probe_pool="mean",
        dtype="float32",
        unroll=True,
    )
    config.data = dict(name="scenes/demo", split="train[:90%]", crop="center")
    config.init_from = "runs/cappa_demo"
    config.init_only = ("encoder/(?!map/).*",)
    # Every head has its own rate and decay; no common clipping, which would couple them.
    settings = [(rate, decay) for rate in RATES for decay in DECAYS]
    config.optimizer = dict(
        name="sgd",
        lr=1.0,
        beta1=0.9,
        weight_decay=1.0,
        clip_norm=0.0,
        lr_mult=tuple((f"heads/{i}/.*", rate) for i, (rate, _) in enumerate(settings)),
        decay=tuple((f"heads/{i}/.*kernel", rate * decay) for i, (rate, decay) in enumerate(settings)),
    )
    config.schedule = dict(kind="cosine", warmup=20)
    config.log_every = 50
    config.checkpoint = dict(every=200)
    config.evals = dict(
        probe=dict(),
        linear_probe=dict(name="scenes/demo"),
    )
    config.variants = dict(
        init="init_from",
        encoder="model.encoder",
        res="model.res",
        pool="model.probe_pool",
        data=("data.name", "evals.linear_probe.name"),
        classes="model.classes",
        steps="steps",
        batch="batch_size",
        seed="seed",
    )
    return config
