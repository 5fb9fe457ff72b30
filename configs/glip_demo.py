"""GLIP from scratch on the embedded data set: colours and shapes that never stood together in training are found.

COMMAND   python -m capvl.main --config=configs/glip_demo.py
DATA      scenes/pairs_apart_96, 20,000 images of 96 px with 2 to 4 objects, made on first use; 8 of 64 pairs of a
          colour and a shape are in none of the training images and in all of the test images
CHIPS     two CPU cores for 20 minutes
EXPECTED  docs/results.md
"""

from ml_collections import ConfigDict

from capvl.data.scenes.world import APART


def get_config():
    config = ConfigDict()
    config.steps = 3000
    config.batch_size = 8
    # Boxes are learned long before words. At the usual weight of words the encoder has let colours go by then.
    config.objective = dict(name="glip", texts=("classes",), negatives=12, slots=4, token=5.0)
    config.model = dict(
        encoder="w96d2h3m384/8",
        stem="conv",
        layer_scale=0.05,
        pad_windows=False,
        level_norms=False,
        res=96,
        max_side=96,
        pixels="half",
        width=64,
        blocks=2,
        groups=8,
        fusion="both",
        fusion_width=128,
        fusion_heads=4,
        text="w96d2h3m384",
        vocab=256,
        length=64,
        text_positions=64,
        dropout=0.0,
        dtype="float32",
        unroll=True,
    )
    config.data = dict(name="scenes/pairs_apart_96", tokenizer="{data_dir}/scenes/wordpiece.txt", flip=True)
    config.optimizer = dict(
        name="adamw",
        lr=1e-3,
        # Faster, and all words become one.
        lr_mult=(("(text|tower/blocks/(text|fusion))/.*", 0.1),),
        weight_decay=1e-4,
        beta2=0.98,
        momentum_dtype="float32",
    )
    config.schedule = dict(kind="cosine", warmup=100)
    config.log_every = 50
    config.checkpoint = dict(every=1000)
    config.evals = dict(
        detection=dict(),
        apart=dict(type="detection", split="test", unseen=APART),
        phrase_boxes=dict(split="test"),
    )
    config.variants = dict(
        steps="steps",
        batch="batch_size",
        lr="optimizer.lr",
        seed="seed",
        data="data.name",
        fusion="model.fusion",
        offsets="model.offsets",
    )
    return config
