"""What a captioner is worth on real data: captions, classes by likelihood, compositionality, entailment.

COMMAND   python -m capvl.evaluate WORKDIR --config=configs/evaluate_captioner.py
DATA      flickr8k, flowers5, cifar10, imagenet_sample and coco128, prepared from tars, and class names and the test
          files of SugarCrepe, NegCLIP and SNLI-VE in DATA_DIR/tests (docs/results.md has the commands)
CHIPS     one CPU core for minutes
EXPECTED  docs/results.md
"""

import cappa_flickr8k


def get_config():
    config = cappa_flickr8k.get_config()
    config.evals = dict(
        captions=dict(count=0, beams=3, metrics=("bleu", "rouge", "cider")),
        baselines=dict(type="caption_baselines"),
        flowers=dict(type="zeroshot_likelihood", name="flowers5"),
        cifar=dict(type="zeroshot_likelihood", name="cifar10"),
        cifar_calibrated=dict(type="zeroshot_likelihood", name="cifar10", calibrated=True),
        imagenet=dict(
            type="zeroshot_likelihood",
            name="imagenet_sample",
            classes="{data_dir}/tests/imagenet_classes.json",
            calibrated=True,
        ),
        sugarcrepe=dict(
            type="compositionality", file="{data_dir}/tests/sugarcrepe_with_images.jsonl", images="coco128"
        ),
        negclip=dict(type="compositionality", format="negclip", file="{data_dir}/tests/negclip_valid.jsonl"),
        negclip_plain=dict(
            type="compositionality", format="negclip", file="{data_dir}/tests/negclip_valid.jsonl", plain=True
        ),
        order=dict(type="compositionality", format="order", images="flickr8k:val"),
        entailment=dict(file="{data_dir}/tests/visual_entailment.jsonl", images="flickr8k"),
        flowers_probe=dict(type="linear_probe", name="flowers5"),
        cifar_probe=dict(type="linear_probe", name="cifar10"),
    )
    return config
