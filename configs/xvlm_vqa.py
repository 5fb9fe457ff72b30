"""X-VLM fine-tuned to answer questions of VQAv2 (arXiv 2111.08276, section 4.2; the official recipe): Swin-B at 384.

Answers are ranked among the commonest ones, a text each line of $TFDS_DATA_DIR/vqa_answers.txt (the official list has
3,128), and written freely beside. The released weights were ranked with the first token counted twice:
`--config.evals.ranked.first_twice=True`.

COMMAND   python -m capvl.main --config=configs/xvlm_vqa.py --workdir=gs://…/xvlm_vqa --config.init_from=gs://…/xvlm_4m
          :res=480,window=15 for images of 480
DATA      python -m capvl.data.prepare annotated --name=vqa --format=vqa --files=coco/
          --train=OpenEnded_train.json,annotations_train.json --val=OpenEnded_val.json,annotations_val.json
          the official recipe trains on validation and Visual Genome's questions too: data.name="vqa*0.6 + vg_qa*0.4"
          BERT's vocab.txt: tokenizers/bert_uncased.txt in $TFDS_DATA_DIR
CHIPS     a TPU pod slice, such as v5e:4x4
EXPECTED  not run by us; the official README has 78.07 on test-dev (4M), 78.22 (16M)
"""

import xvlm_caption


def get_config():
    config = xvlm_caption.get_config()
    config.batch_size = 192
    config.steps = 23_000  # 10 epochs of 443,757 questions
    config.objective = dict(name="xvlm_answers", answers=10)
    del config.model.words
    config.model.length = 10
    config.model.question_length = 40
    config.model.answer_layers = 6
    config.data.name = "vqa"
    config.optimizer.lr = 5e-5
    config.optimizer.lr_mult = (("answers/cross/cross_kv/.*", 2.0),)
    config.schedule.warmup = 2300
    # Keys and values of questions are of another width than those of Swin's images, and begin anew.
    config.init_only = ("encoder/.*", "text/.*", "answers/(?!cross/cross_kv/).*")
    ranked = dict(type="vqa", metrics=("vqa", "exact"), rank=128, vocabulary="{data_dir}/vqa_answers.txt")
    config.evals = dict(ranked=ranked, written=dict(type="vqa", metrics=("vqa",), beams=3))
    return config
