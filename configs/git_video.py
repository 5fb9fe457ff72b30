"""GIT fine-tuned on clips: captions, and answers by :tasks (section 3.2); begins with the weights of an image model.

Six frames, drawn one of each sixth of the clip; their vectors begin at zero.

COMMAND   python -m capvl.main --config=configs/git_video.py --workdir=gs://…/git_msrvtt --config.init_from=gs://…/git_b16
          questions: --config.objective.tasks="('answer',)" --config.optimizer.lr=5e-5 --config.evals.captions.count=1
DATA      python -m capvl.data.prepare annotated --name=msrvtt --format=msrvtt --files=videos/ --frames=16
          --all=videodatainfo.json,qa.json (formats msvd, vatex)
CHIPS     a TPU VM, such as v5e:2x4
EXPECTED  not run by us; the paper's GIT_B: CIDEr 57.8 on MSR-VTT, 60.0 on VATEX, accuracy 41.0 on MSRVTT-QA (batch 512,
          20 epochs, base rate 1e-5)
"""

import git_coco


def get_config():
    config = git_coco.get_config()
    config.steps = 2800  # 10 epochs of 140,200 captions
    config.model.frames = 6
    config.data.name = "msrvtt"
    config.optimizer.lr = 5e-5
    config.init_from = "runs/git_b16"
    config.init_only = ("(encoder|decoder)/.*",)
    config.evals.captions.submission = "clips"
    config.variants.update(frames="model.frames", frame_pool="model.frame_pool")
    return config
