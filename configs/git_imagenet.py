"""GIT classifies by writing the class's name (section 3.2): all of ImageNet, or 1 or 5 images a class.

COMMAND   python -m capvl.main --config=configs/git_imagenet.py --workdir=gs://…/git_in --config.init_from=gs://…/git_b16
          :data=imagenet2012_subset/1pct; few-shot: --config.data.name=imagenet2012_fewshot/1shot,steps=300 (5shot)
DATA      imagenet2012 through tfds; the names of the classes must differ (crane, maillot …): a file of 1,000 as
          DATA_DIR/tests/imagenet_classes.json
CHIPS     a TPU pod slice, such as v5e:4x4
EXPECTED  not run by us; the paper's GIT: 88.79 with all images
"""

import git_b16


def get_config():
    config = git_b16.get_config()
    config.steps = 12_500  # 10 epochs
    config.batch_size = 1024
    config.objective = dict(name="git", tasks=("classify",), smoothing=0.1)
    config.data.name = "imagenet2012"
    config.data.class_names = "{data_dir}/tests/imagenet_classes.json"
    config.optimizer.lr = 2.5e-5
    config.schedule = dict(kind="cosine", warmup=100)
    config.init_from = "runs/git_b16"
    config.init_only = ()
    config.eval_every = 0
    names = dict(type="vqa", task="classify", split="validation")
    config.evals = dict(
        free=dict(names, metrics=("exact", "contains")),
        closed=dict(names, vocabulary="classes"),
    )
    return config
