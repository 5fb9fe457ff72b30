"""X-VLM from scratch on 5,673 real photos with captions and boxes of their phrases, sized for two CPU cores.

COMMAND   python -m capvl.main --config=configs/xvlm_flickr8k.py
DATA      flickr8k, prepared from tar shards (docs/results.md has the command), and
          python -m capvl.data.tokenizer --kind=wordpiece --data=flickr8k --vocab=2000
          --out=$TFDS_DATA_DIR/flickr8k/wordpiece_2000.txt
CHIPS     one CPU core for 25 minutes, two for less
EXPECTED  docs/results.md
"""

import xvlm_demo


def get_config():
    config = xvlm_demo.get_config()
    config.steps = 1500
    # At the scenes' rate of 1e-3 nothing is learned: contrast stays at log(batch).
    config.optimizer.lr = 3e-4
    config.schedule.warmup = 200
    config.objective.slots = 4
    config.model.update(encoder="w128d4h4m512/8", vocab=2000)
    config.data = dict(
        name="pairs=flickr8k + regions=flickr8k",
        tokenizer="{data_dir}/flickr8k/wordpiece_2000.txt",
        crop_scale=(0.4, 1.0),
        eval_crop="squash",
        flip=True,
    )
    config.evals = dict(
        retrieval=dict(name="flickr8k", captions=5, rerank=32),
        grounding=dict(name="flickr8k"),
        cam=dict(type="grounding", name="flickr8k", method="gradcam"),
    )
    return config
