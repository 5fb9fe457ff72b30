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

import git_b16


def get_config():
    config = git_b16.get_config()
    config.steps = 2800  # 10 epochs of 140,200 captions
    config.batch_size = 512
    config.objective = dict(name="git", tasks=("caption",), smoothing=0.1)
    config.model.frames = 6
    config.data.name = "msrvtt"
    config.optimizer.lr = 5e-5
    config.schedule = dict(kind="cosine", warmup=200)
    config.init_from = "runs/git_b16"
    config.init_only = ("(encoder|decoder)/.*",)
    config.eval_every = 0
    config.evals = dict(
        captions=dict(
            split="test",
            count=0,
            beams=4,
            length_penalty=0.6,
            rule="official",
            metrics=("bleu", "meteor", "rouge", "cider"),
            submission="clips",
        ),
    )
    config.variants.update(frames="model.frames", frame_pool="model.frame_pool", encoder="model.encoder")
    return config
