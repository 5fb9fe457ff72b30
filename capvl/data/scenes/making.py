"""Makes the embedded data set and its tokenizers where they aren't there yet."""

import os
import tempfile

from capvl.data.scenes import language, statements, world
from capvl.data.text import training
from capvl.errors import UserError, nearest

SCENES_VOCAB = 128
TOKENIZERS = {
    "unigram": f"tokenizer_{SCENES_VOCAB}.model",
    "wordpiece": "wordpiece.txt",
    "statements": "statements.txt",
}
"""Files of the tokenizers by their kind."""


def scenes(config: str, data_dir: str) -> str:
    """The folder of the embedded data set in a configuration, made if it isn't there.

    Raises:
      UserError: unknown configuration, or the folder can't be written.
    """
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    from capvl.data.scenes.builder import Scenes

    known = [c.name for c in Scenes.BUILDER_CONFIGS]
    if config not in known:
        raise UserError(f"scenes has no configuration {config!r}." + nearest(config, known))
    builder = Scenes(config=config, data_dir=data_dir, file_format="array_record")
    if not os.path.exists(os.path.join(builder.data_dir, "dataset_info.json")):
        total = sum(builder.builder_config.counts)
        print(f"Making the embedded data set scenes/{config} ({total} examples) in {builder.data_dir} …", flush=True)
        tfds.disable_progress_bar()
        try:
            _make(Scenes, config, data_dir, str(builder.data_dir))
        except OSError as e:
            raise UserError(f"Data set scenes/{config} can't be written to {data_dir!r}: {e}") from e
    return str(builder.data_dir)


def _make(cls: type, config: str, data_dir: str, folder: str) -> None:
    """Makes a data set beside its place and moves it there; of two that make it at once, the first one's stays."""
    os.makedirs(data_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=data_dir) as nearby:
        builder = cls(config=config, data_dir=nearby, file_format="array_record")
        builder.download_and_prepare()
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        try:
            os.rename(builder.data_dir, folder)
        except OSError:
            if not os.path.exists(os.path.join(folder, "dataset_info.json")):
                raise


def scenes_tokenizer(data_dir: str, kind: str = "unigram") -> str:
    """Path of the embedded data set's tokenizer, trained if it isn't there.

    Args:
      data_dir: where prepared data sets are.
      kind: "unigram" (SentencePiece, SCENES_VOCAB pieces at most), "wordpiece" (all words of captions and questions, as
        BERT's) or "statements" (beside them those of statements).
    """
    path = os.path.join(data_dir, "scenes", TOKENIZERS[kind])
    if not os.path.exists(path):
        texts = statements.texts(2000) if kind == "statements" else []
        for i in range(2000):
            rng = world.generator(0, "train", i)
            scene = world.draw_scene(rng)
            texts += language.captions(scene, rng)
            texts += [row[k] for row in language.questions(scene, rng) for k in ("question", "answer")]
            texts += language.clip_captions(world.draw_clip(rng, 4))
        if kind == "unigram":
            training.train(texts, SCENES_VOCAB, path)
        else:
            training.train_word_piece(texts, 4 * SCENES_VOCAB, path)
    return path
