"""Both towers of lit_flickr8k.py from scratch, for comparison at equal time.

COMMAND   python -m capvl.main --config=configs/clip_flickr8k.py
DATA      as lit_flickr8k.py
CHIPS     one CPU core for minutes
EXPECTED  docs/results.md
"""

import lit_flickr8k


def get_config():
    config = lit_flickr8k.get_config()
    config.objective.locked = False
    config.init_from = ""
    config.init_only = ()
    return config
