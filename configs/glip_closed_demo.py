"""An ordinary detector with a closed list of classes on the backbone of GLIP's demo: what that is compared with.

COMMAND   python -m capvl.main --config=configs/glip_closed_demo.py
DATA      as configs/glip_demo.py
CHIPS     as configs/glip_demo.py
EXPECTED  docs/results.md
"""

import glip_demo

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "hexagon")


def get_config():
    config = glip_demo.get_config()
    config.objective = dict(name="glip", texts=("classes",), order="fixed", slots=4)
    pairs = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
    config.model.update(classes=pairs, length=len(pairs), fusion="none")
    return config
