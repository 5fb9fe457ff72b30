"""X-VLM fine-tuned to answer questions of VQAv2 (arXiv 2111.08276, section 4.2), in the official way: Swin-B at 384.

Answers are ranked among the commonest ones, a text each line of $TFDS_DATA_DIR/vqa_answers.txt, and written freely
beside. The original counts the first token of a ranked answer twice: --config.evals.ranked.first_twice=True.

COMMAND   python -m capvl.main --config=configs/xvlm_vqa.py --workdir=gs://…/xvlm_vqa --config.init_from=gs://…/xvlm_4m
          :res=480,window=15 for images of 480
DATA      python -m capvl.data.prepare annotated --name=vqa --format=vqa --files=coco/
          --train=OpenEnded_train.json,annotations_train.json --val=OpenEnded_val.json,annotations_val.json
          for the test server it also learns validation and Visual Genome's questions, which have one answer each and
          weigh half: a mixture in data.name
CHIPS     a TPU pod slice, such as v5e:4x4
EXPECTED  not run by us; the original's README: 78.07 on test-dev (4M), 78.22 (16M)
"""

import xvlm_caption

QUESTIONS = 443_757


def get_config():
    config = xvlm_caption.get_config()
    config.batch_size = 192
    config.steps = 10 * QUESTIONS // 192
    config.objective = dict(name="xvlm_answers", answers=10, lone=0.5)
    del config.model.words
    config.model.update(length=10, question_length=40, answer_layers=6)
    config.data.name = "vqa"
    config.optimizer.update(lr=5e-5, lr_mult=(("answers/cross/cross_kv/.*", 2.0),))
    config.schedule.warmup = config.steps // 10
    # Keys and values of questions are of another width than those of Swin's images, and begin anew.
    config.init_only = ("encoder/.*", "text/.*", "answers/(?!cross/cross_kv/).*")
    config.evals = dict(
        ranked=dict(type="vqa", metrics=("vqa", "exact"), rank=128, vocabulary="{data_dir}/vqa_answers.txt"),
        written=dict(type="vqa", metrics=("vqa", "exact"), beams=3),
    )
    return config
