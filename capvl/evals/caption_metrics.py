"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE by the COCO caption evaluation's own code (pycocoevalcap)."""

import contextlib
import importlib
import io
import os
import re
import shutil

from capvl.errors import UserError, nearest

METRICS = ("bleu", "meteor", "rouge", "cider", "spice")


def check(metrics: tuple[str, ...]) -> None:
    """Raises UserError where a metric is unknown, or what it needs is not there."""
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"The caption metric {metric!r} is unknown." + nearest(metric, METRICS))
    if not metrics:
        return
    try:
        import pycocoevalcap  # An extra.
    except ImportError as e:
        raise UserError("Caption metrics need pycocoevalcap: pip install 'capvl[captions]'.") from e
    if not shutil.which("java"):
        raise UserError("Caption metrics need Java, for the tokenizer that defines them: install a JRE.")
    jars = os.path.join(next(iter(pycocoevalcap.__path__)), "spice", "lib")
    if "spice" in metrics and not any(name.startswith("stanford-corenlp-3.6.0") for name in os.listdir(jars)):
        raise UserError(f"SPICE needs Stanford CoreNLP 3.6.0 (its two jar files) in {jars!r}.")


def tokenize(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Texts by key as the Penn Treebank tokenizer splits them, lower case and without punctuation.

    The tokenizer reads a text a line and writes a line a text, so what it takes for a line's end becomes a space.

    Raises:
      UserError: it can't be run, or gives another number of lines.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # An extra.

    rows = {key: [{"caption": _one_line(text)} for text in values] for key, values in texts.items()}
    # Behind all texts stands one that is known: it comes out there only where none before it made two lines or none.
    rows[_LAST] = [{"caption": _LAST}]
    try:
        with _quiet():
            tokens = PTBTokenizer().tokenize(rows)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"The caption metrics' tokenizer can't be run: {e}.") from e
    if tokens.pop(_LAST, None) != [_LAST] or any(len(tokens.get(k, ())) != len(v) for k, v in texts.items()):
        raise UserError(
            f"The caption metrics' tokenizer did not give a line for each of {len(rows) - 1:,} images' texts."
        )
    return tokens


_LAST = "endofallcaptions"
_ENDS = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029]")


def _one_line(text: str) -> str:
    return _ENDS.sub(" ", text).encode("utf-8", "replace").decode()


@contextlib.contextmanager
def _quiet():
    """Python's and the Java programs' chatter goes nowhere."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def scores(references: dict[str, list[str]], written: dict[str, str], metrics=METRICS[:4]):
    """(corpus scores by name, scores of each key by name) of written captions.

    Names are those of COCO: Bleu_1 to Bleu_4, METEOR, ROUGE_L, CIDEr, SPICE.

    Args:
      references: what people wrote, by key.
      written: one caption by key.
      metrics: of METRICS.

    Raises:
      UserError: see `check`.
    """
    check(tuple(metrics))
    wanted = tokenize({key: references[key] for key in written})
    found = tokenize({key: [text] for key, text in written.items()})
    return scores_of_tokens(wanted, found, metrics)


def scores_of_tokens(references: dict[str, list[str]], written: dict[str, list[str]], metrics=METRICS[:4]):
    """As `scores`, of tokenized captions."""
    corpus, each = {}, {key: {} for key in written}
    for metric in metrics:
        for name, value, values in _score(metric, references, written):
            corpus[name] = float(value)
            for key, single in zip(references, values, strict=True):
                each[key][name] = float(single["All"]["f"] if isinstance(single, dict) else single)
    return corpus, each


def _score(metric: str, references, written):
    """(name, corpus score, scores in the order of the references) of one metric."""
    module, name = {
        "bleu": ("bleu.bleu", "Bleu"),
        "meteor": ("meteor.meteor", "Meteor"),
        "rouge": ("rouge.rouge", "Rouge"),
        "cider": ("cider.cider", "Cider"),
        "spice": ("spice.spice", "Spice"),
    }[metric]
    scorer = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)
    with _quiet():
        value, values = (scorer(4) if metric == "bleu" else scorer()).compute_score(references, written)
    if metric == "bleu":
        return [(f"Bleu_{n + 1}", value[n], values[n]) for n in range(4)]
    names = {"meteor": "METEOR", "rouge": "ROUGE_L", "cider": "CIDEr", "spice": "SPICE"}
    return [(names[metric], value, values)]
