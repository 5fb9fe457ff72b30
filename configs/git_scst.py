"""The last stage of captioning: self-critical training of git_coco.py's model on CIDEr-D (arXiv 1612.00563).

COMMAND   python -m capvl.data.frequencies --data=coco --tokenizer=$TFDS_DATA_DIR/tokenizers/bert_uncased.txt \
              --out=$TFDS_DATA_DIR/tokenizers/coco_frequencies.npz
          python -m capvl.main --config=configs/git_scst.py --workdir=gs://…/git_scst --config.init_from=gs://…/git_coco
DATA      as git_coco.py
CHIPS     a TPU VM, such as v5e:2x4
EXPECTED  not run by us; the paper's GIT goes from 144.8 to 151.1 CIDEr
"""

import git_coco


def get_config():
    config = git_coco.get_config()
    config.steps = 2200
    config.batch_size = 256
    config.objective = dict(
        name="scst", frequencies="{data_dir}/tokenizers/coco_frequencies.npz", samples=5, references=5
    )
    config.optimizer.lr = 1e-6
    config.init_from = "runs/git_coco"
    config.variants = dict(init="init_from", data="data.name", steps="steps", lr="optimizer.lr", seed="seed")
    return config
