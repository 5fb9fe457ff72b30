"""GLIP fine-tuned on a data set of one's own, or on each of ODinW's (arXiv 2112.03857, section 4.3): all parameters.

COMMAND   python -m capvl.main --config=configs/glip_odinw.py:data=aquarium --config.init_from=gs://…/glip_t
          several sets, shots and seeds, beside the other ways of tuning, and their means:
          python -m capvl.sweep --config=full=configs/glip_odinw.py --config=linear=configs/glip_linear.py
              --config=prompt=configs/glip_prompt.py --data=aquarium,raccoon --shots=0,1*8,3*4,5*2,10,all
              --seeds=3,30,300 --epochs=200 --out=runs/odinw --config.init_from=gs://…/glip_t
          with all images the official code waits for less: :patience=3,stop=4
DATA      python -m capvl.data.prepare regions --name=aquarium --format=odinw (docs/glip.md)
CHIPS     a TPU VM, or a GPU
EXPECTED  not run by us. The paper, mean AP over 13 sets with 0, 1, 3, 5, 10 shots and all images: T 46.5, 51.1, 54.9,
          56.4, 58.4, 64.9; L 52.1, 59.9, 62.1, 64.2, 64.9, 68.9
"""

import glip_coco


def get_config():
    config = glip_coco.get_config()
    config.batch_size = 4
    # 200 epochs of 500 images at most; the plateau ends it. The sweep counts epochs by itself.
    config.steps = 25_000
    config.eval_every = 125
    config.data.name = "aquarium"
    # The first two stages of the Swin stay, as in the official code.
    config.optimizer.update(lr=1e-4, weight_decay=0.05, frozen=("encoder/(stem|stem_norm|stages/[01])(/.*)?",))
    config.schedule = dict(kind="plateau", warmup=50, patience=4)
    config.watch = dict(metric="val/AP", stop_patience=8, test=("final",))
    config.evals = dict(val=dict(type="detection", split="val"), final=dict(type="detection", split="test"))
    config.variants.update(patience="schedule.patience", stop="watch.stop_patience")
    config.variants.update(data="data.name", shots="data.shots", shots_seed="data.shots_seed")
    return config
