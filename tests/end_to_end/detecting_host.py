"""One of several hosts that evaluate a hand-made detector: `python detecting_host.py TESTS DATA OUT`, with JAX's
variables of the coordinator. Writes what it yields to OUT.PROCESS."""

import json
import pathlib
import sys

tests, data, out = sys.argv[1:]
sys.path[:0] = [tests, f"{tests}/evals"]

import jax

from capvl.parallel import distributed

distributed.start()

import test_detection_evaluators as evaluators
from pointing import tokenizer

from capvl.data.text import tokenizers

words = pathlib.Path(f"{out}.words{jax.process_index()}")
words.mkdir()
own = tokenizer(words)
tokenizers.load = lambda path, start=True: own
asked = {
    "detection": evaluators.Detection(submission=True),
    "lvis": evaluators.Lvis(name="some"),
    "phrases": evaluators.PhraseBoxes(name="said"),
}
found = {
    name: evaluators.numbers(
        evaluators.evaluate(evaluator, data, devices=jax.device_count(), blind="green", out=pathlib.Path(out).parent)
    )
    for name, evaluator in asked.items()
}
pathlib.Path(f"{out}.{jax.process_index()}").write_text(json.dumps(found))
