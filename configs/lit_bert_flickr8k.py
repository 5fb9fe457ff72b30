"""lit_flickr8k.py with a pre-trained sentence encoder as the text tower: all-MiniLM-L6-v2, a BERT of 6 layers.

COMMAND   python -m capvl.convert --from=huggingface --to=capvl FOLDER_OF_all-MiniLM-L6-v2 runs/minilm
          python -m capvl.main --config=configs/lit_bert_flickr8k.py, after cappa_flickr8k.py
DATA      flickr8k, flowers5, cifar10 (docs/results.md has the commands)
CHIPS     one CPU core for minutes
EXPECTED  docs/results.md
"""

import lit_flickr8k


def get_config():
    config = lit_flickr8k.get_config()
    config.model.update(
        text="w384d6h12m1536",
        vocab=30522,
        text_norm="post",
        text_activation="gelu",
        text_eps=1e-12,
        text_pool="mean",
        text_hides_padding=True,
    )
    config.data.tokenizer = "runs/minilm/tokenizer.json"
    config.init_from = "runs/cappa_flickr8k + runs/minilm"
    config.init_only = ("encoder/(?!map/).*", "text/(?!head/).*")
    return config
