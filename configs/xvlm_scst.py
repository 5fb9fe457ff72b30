"""The last stage of captioning: self-critical training of xvlm_caption.py's model on CIDEr-D (arXiv 1612.00563).

COMMAND   python -m capvl.data.frequencies --data=coco --tokenizer=$TFDS_DATA_DIR/tokenizers/xvlm/vocab.txt \
              --out=$TFDS_DATA_DIR/tokenizers/coco_frequencies.npz
          python -m capvl.main --config=configs/xvlm_scst.py --workdir=gs://…/xvlm_scst
              --config.init_from=gs://…/xvlm_caption
DATA      as xvlm_caption.py
CHIPS     a TPU VM, such as v5e:2x4
EXPECTED  not run by us; the original's README: CIDEr 140.8 after 133.1 (4M), 140.3 after 134.0 (16M)
"""

import xvlm_caption


def get_config():
    config = xvlm_caption.get_config()
    config.batch_size = 64
    config.steps = 44_275
    config.objective = dict(
        name="xvlm_scst", frequencies="{data_dir}/tokenizers/coco_frequencies.npz", samples=5, references=5
    )
    config.schedule.warmup = config.steps // 10
    config.init_from = "runs/xvlm_caption"
    return config
