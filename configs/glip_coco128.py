"""GLIP from scratch on 106 real photos of COCO: the whole path on one's own data, in minutes; not a good detector.

COMMAND   python -m capvl.main --config=configs/glip_coco128.py --workdir=runs/coco128
DATA      coco128, boxes of 80 classes: python -m capvl.data.prepare tars --name=coco128_tars --train=… --val=…, then
          python -m capvl.data.prepare regions --name=coco128 --format=prepared --train=coco128_tars:train
              --val=coco128_tars:val --classes=classes.json --allow_leaks, and
          python -m capvl.data.tokenizer --data=coco128 --vocab=300 --kind=wordpiece
              --out=DATA_DIR/coco128/wordpiece.txt
CHIPS     two CPU cores
EXPECTED  docs/results.md
"""

import glip_demo


def get_config():
    config = glip_demo.get_config()
    config.steps = 500
    config.objective.update(negatives=30, slots=40, sizes=((192, 256), (256, 192)))
    config.model.update(res=192, max_side=256, vocab=300, length=128, text_positions=128)
    config.data = dict(name="coco128", tokenizer="{data_dir}/coco128/wordpiece.txt", flip=True)
    config.evals = dict(detection=dict(), training=dict(type="detection", split="train"))
    return config
