"""X-VLM that finds what an expression names without having seen a box: fine-tuned as for retrieval on images and
expressions, then Grad-CAM over given detections, or over all boxes of its grid (section 4.2).

COMMAND   python -m capvl.main --config=configs/xvlm_grounding_weak.py --workdir=gs://…/xvlm_weak
              --config.init_from=gs://…/xvlm_4m
          zero-shot, without the fine-tuning:
          python -m capvl.evaluate gs://…/xvlm_4m --config=configs/xvlm_grounding_weak.py
DATA      as xvlm_grounding.py, whose boxes only the evaluators use; MAttNet's detections as {data_dir}/dets.json
CHIPS     a TPU VM, such as v5e:4x4
EXPECTED  not run by us; ALBEF's numbers in the original's README: 58.46/65.89/46.25 on RefCOCO+ val/testA/testB
"""

import xvlm_retrieval

EXPRESSIONS = 120_191


def get_config():
    config = xvlm_retrieval.get_config()
    config.steps = 5 * EXPRESSIONS // 160
    config.objective.pair_texts = "regions"
    # Expressions tell where in the whole image something is: nothing of it is cut off.
    config.data.update(name="refcoco_plus", crop="squash")
    config.optimizer.lr = 2e-5
    config.schedule.warmup = config.steps // 10
    # Layer 9 of 12: the fourth that looks at images.
    weak = dict(type="grounding", split="val,testA,testB", method="gradcam", layer=3)
    config.evals = dict(detections=weak | dict(detections="{data_dir}/dets.json"), all_boxes=weak)
    config.variants = dict(steps="steps", batch="batch_size", lr="optimizer.lr", data="data.name", seed="seed")
    return config
