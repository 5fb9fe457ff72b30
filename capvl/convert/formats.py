"""The table of conversions: which file here knows which model type of which framework.

A new one is a file and a line in FORMATS. What its file has:

    read(source: Source) -> Weights            the model, with its processor's pixels and its tokenizer
    write(weights: Weights, target: Target)    the same, back
    fits(options) -> bool                      whether a model of ours is written so, where its framework has several
"""

import dataclasses
import importlib
import types

from capvl.convert.files import Source, Target
from capvl.errors import UserError
from capvl.weights import Weights


@dataclasses.dataclass(frozen=True)
class Format:
    """A model type of a framework.

    Attributes:
      framework: as users name it.
      model_type: as the framework's configurations name it; "" where they don't have to, because there is but one.
      file: name of the module in this package.
      reads, writes: whether it has a reader, a writer.
    """

    framework: str
    model_type: str
    file: str
    reads: bool = True
    writes: bool = True

    def module(self) -> types.ModuleType:
        """The file, imported when it is used: models are slow to import, and --help doesn't need them."""
        return importlib.import_module(f"{__package__}.{self.file}")


FORMATS = (
    Format("capvl", "", "folder"),
    Format("big_vision", "", "big_vision"),
    # The first that fits a model writes it.
    Format("huggingface", "bert", "bert"),
    Format("huggingface", "roberta", "roberta"),
    Format("huggingface", "swin", "swin"),
    Format("huggingface", "git", "git"),
    Format("huggingface", "clip", "hugging_face"),
    Format("huggingface", "siglip", "siglip"),
    Format("huggingface", "vit", "vit", writes=False),
    Format("git", "", "git_official", writes=False),
    Format("xvlm", "", "xvlm_official"),
    Format("glip", "", "glip_official"),
    Format("swin", "", "swin_original", writes=False),
    Format("open_clip", "", "open_clip", writes=False),
    Format("timm", "", "timm"),
    Format("stablehlo", "", "stablehlo", reads=False),
)
SOURCES = tuple(dict.fromkeys(f.framework for f in FORMATS if f.reads))
TARGETS = tuple(dict.fromkeys(f.framework for f in FORMATS if f.writes))


def read(framework: str, path: str, *, heads: int = 0, allow_pickle: bool = False, trust: bool = False) -> Weights:
    """A model of another framework (or of ours) as ours.

    Args:
      framework: one of SOURCES.
      path, heads, allow_pickle, trust: as in `capvl.convert.files.Source`.

    Raises:
      UserError: unreadable, or not such a model.
    """
    source = Source(path, heads, allow_pickle, trust)
    known = {f.model_type: f for f in FORMATS if f.framework == framework and f.reads}
    if len(known) == 1:
        (found,) = known.values()
        return found.module().read(source)
    declared = source.config.get("model_type")
    model_type = str(declared or "").removesuffix("_vision_model").removesuffix("_text_model")
    if model_type not in known:
        raise UserError(
            f"{path!r} needs a config.json beside its weights whose model_type is one of {', '.join(known)}; "
            f"found {declared!r}."
        )
    return known[model_type].module().read(source)


def write(framework: str, path: str, weights: Weights, *, scan: bool = False) -> None:
    """Writes our model for another framework (or as a folder of ours).

    Args:
      framework: one of TARGETS.
      path, scan: as in `capvl.convert.files.Target`.
      weights: the model.

    Raises:
      UserError: the model is not of a form that the framework has, or can't be written.
    """
    modules = [f.module() for f in FORMATS if f.framework == framework and f.writes]
    if len(modules) > 1:
        modules = [module for module in modules if module.fits(weights.options)]
    if not modules:
        raise UserError(f"{framework} has no form of this model that is known here.")
    modules[0].write(weights, Target(path, scan))
