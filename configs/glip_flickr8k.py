"""GLIP from scratch on 5,673 real photos whose captions' phrases have boxes; not a good detector.

COMMAND   python -m capvl.main --config=configs/glip_flickr8k.py
DATA      flickr8k and its tokenizer, as for configs/xvlm_flickr8k.py
CHIPS     one CPU core for half an hour, two for less
EXPECTED  docs/results.md
"""

import glip_demo


def get_config():
    config = glip_demo.get_config()
    config.steps = 2000
    # Most photos are 4:3, so nearly nothing of a batch is padding.
    config.objective.update(texts=("captions",), slots=16, sizes=((96, 128), (128, 96)))
    config.model.update(res=96, max_side=128, vocab=2000, length=40, text_positions=40)
    config.data = dict(name="flickr8k", tokenizer="{data_dir}/flickr8k/wordpiece_2000.txt", flip=True)
    config.evals = dict(phrase_boxes=dict())
    return config
