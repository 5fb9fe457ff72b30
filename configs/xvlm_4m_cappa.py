"""X-VLM on an encoder that CapPa pre-trained (configs/cappa_b16.py): a region's summary is the mean of its tokens.

COMMAND   python -m capvl.main --config=configs/xvlm_4m_cappa.py --workdir=gs://…/xvlm_4m_cappa
              --config.init_from="gs://…/cappa_b16 + gs://…/bert_base"
              --config.init_only="('encoder/.*', 'text/(?!cross/cross).*')"
DATA      as xvlm_4m.py
CHIPS     as xvlm_4m.py
EXPECTED  not run by us
"""

import xvlm_4m


def get_config():
    config = xvlm_4m.get_config()
    config.model = dict(encoder="B/16", res=224, pixels="half", text="B", cross_layers=6, length=40, reads_end=False)
    return config
