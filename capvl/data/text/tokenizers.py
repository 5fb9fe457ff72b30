"""Tokenizers: SentencePiece models, trained here (`capvl.data.text.training`) or not, and others' word pieces.

A text becomes `length` ids: the pieces, then the end-of-sentence id, then 0. The end is
"sticky": where the text is too long it is cut and still ends with the end-of-sentence id. Zeros behind the end are
padding; a zero before it is a piece, where a vocabulary has one of id 0 (`capvl.nn.padding`).

The names of special tokens are plain text where a caption has them: "[SEP]" ends nothing.

Files of other frameworks are read by the `tokenizers` library: tokenizer.json of Hugging Face, CLIP's vocab.json with
merges.txt beside, BERT's vocab.txt and CLIP's bpe_simple_vocab_16e6.txt.gz; their texts also begin with the start id
that the model was trained with. What tokenizer_config.json beside a file says of letters and punctuation is done
(`capvl.data.text.cleaning`).
"""

import functools
import gzip
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from etils import epath
from sentencepiece import sentencepiece_pb2

from capvl import storage
from capvl.data.text.cleaning import SETTINGS, clean, cleaner, settings
from capvl.data.text.spans import TokenSpans, characters, token_spans
from capvl.errors import UserError
from capvl.lines import read_text, split
from capvl.nn.padding import lengths

PAD, EOS, UNK = 0, 1, 2
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_CHARACTERS = 4096


class Tokenizer:
    """A SentencePiece model whose id 0 is padding. Pickles as its path."""

    start_id = None  # Texts begin with their first piece.

    def __init__(self, path: str | os.PathLike):
        """path: the .model file.

        Raises:
          UserError: it is missing, not a SentencePiece model, or has no end-of-sentence piece.
        """
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise UserError(
                f"Tokenizer {self.path!r} is missing; train one with "
                f"`python -m capvl.data.tokenizer --data=NAME --vocab=N --out={self.path}`."
            )
        self._clean = cleaner(settings(self.path))
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=self.path)
        except (RuntimeError, OSError) as e:
            raise UserError(f"Tokenizer {self.path!r} is not a SentencePiece model.") from e
        self.eos = self._model.eos_id()
        if self.eos < 1:
            raise UserError(f"Tokenizer {self.path!r} has no end-of-sentence piece with an id above 0.")

    def __reduce__(self):
        return (Tokenizer, (self.path,))

    @property
    def vocab(self) -> int:
        """Number of ids."""
        return self._model.vocab_size()

    def pieces(self) -> list[str]:
        """What each id means."""
        return [self._model.id_to_piece(i) for i in range(self.vocab)]

    def __call__(self, text: str | bytes, length: int) -> np.ndarray:
        """(length,) int32 ids: pieces, end of sentence, padding."""
        ids = self._model.encode(self._clean(_as_text(text)))[: length - 1]
        out = np.zeros(length, np.int32)
        out[: len(ids)] = ids
        out[len(ids)] = self.eos
        return out

    def spans(self, text: str | bytes, length: int) -> TokenSpans:
        """As the call, with the characters of the text that each token covers."""
        text = _as_text(text)
        cleaned = self._clean(text)
        found = self._model.encode(cleaned, out_type="serialized_proto")  # Offsets in bytes, in every version.
        pieces, before = sentencepiece_pb2.SentencePieceText.FromString(found).pieces, characters(cleaned)
        covered = [(before[piece.begin], before[piece.end]) for piece in pieces]
        return token_spans(text, cleaned, [p.id for p in pieces] + [self.eos], [*covered, None], self.eos, length)

    def decode(self, ids: np.ndarray) -> str:
        """The text up to the end of sentence or padding."""
        ids = _until(self.eos, ids)
        return self._model.decode([i for i in ids if i < self.vocab])

    def id_of(self, piece: str) -> int | None:
        """Id of a piece; None where there is none."""
        found = self._model.piece_to_id(piece)
        return found if self._model.id_to_piece(found) == piece else None


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library: start, pieces, end, and 0 behind. Pickles as its path."""

    def __init__(self, path: str | os.PathLike, start: bool = True):
        """Reads a file.

        Args:
          path: tokenizer.json, CLIP's vocab.json (with merges.txt) or merges (.txt.gz), or BERT's vocabulary (.txt).
          start: whether texts begin with the start id.

        Raises:
          UserError: it is missing or not such a file.
        """
        self.path, self.start = os.fspath(path), start
        said = settings(self.path)
        self._clean = clean if self.path.endswith(".gz") else cleaner(said)
        if not os.path.isfile(self.path):
            raise UserError(f"Tokenizer {self.path!r} is missing.")
        try:
            if os.path.basename(self.path) == "vocab.json":
                self._model = _clip_of_hugging_face(self.path)
            elif self.path.endswith(".json"):
                self._model = tokenizers.Tokenizer.from_file(self.path)
            elif self.path.endswith(".gz"):
                self._model = _clip_bpe(self.path)
            else:
                self._model = _word_piece(self.path, said)
            self._model.no_padding()
            self._model.no_truncation()
            self._model.encode_special_tokens = True  # What stands in a text is no special token.
        except Exception as e:  # The library raises bare Exceptions.
            raise UserError(f"Tokenizer {self.path!r} can't be read: {e}") from e
        ends = self._model.encode("").ids
        if not ends:
            raise UserError(
                f"Tokenizer {self.path!r} puts no end behind a text, so texts couldn't be told from padding."
            )
        self.eos, self._starts = ends[-1], set(ends[:-1])
        self._first = 0 if start else len(ends) - 1
        self.start_id = ends[0] if len(ends) > 1 else None

    def __reduce__(self):
        return (SubwordTokenizer, (self.path, self.start))

    @property
    def vocab(self) -> int:
        """Number of ids."""
        return self._model.get_vocab_size()

    def pieces(self) -> list[str]:
        """What each id means; "" for an id without a piece."""
        named = {i: piece for piece, i in self._model.get_vocab(with_added_tokens=True).items()}
        return [named.get(i, "") for i in range(max(named) + 1)]

    def __call__(self, text: str | bytes, length: int) -> np.ndarray:
        """(length,) int32 ids: start, pieces, end, padding."""
        ids = self._model.encode(self._clean(_as_text(text))).ids[self._first :]
        ids = ids if len(ids) <= length else [*ids[: length - 1], self.eos]
        out = np.zeros(length, np.int32)
        out[: len(ids)] = ids
        return out

    def spans(self, text: str | bytes, length: int) -> TokenSpans:
        """As the call, with the characters of the text that each token covers."""
        text = _as_text(text)
        cleaned = self._clean(text)
        found = self._model.encode(cleaned)
        rows = zip(found.ids, found.offsets, found.special_tokens_mask, strict=True)
        ids, covered = zip(*((i, None if special else offsets) for i, offsets, special in rows), strict=True)
        return token_spans(text, cleaned, ids[self._first :], covered[self._first :], self.eos, length)

    def decode(self, ids: np.ndarray) -> str:
        """The text up to the end or padding."""
        ids = np.asarray(ids).tolist()
        begin = 1 if ids[:1] and ids[0] in self._starts else 0  # OPT's start is its end.
        ids = _until(self.eos, ids[begin:])
        return self._model.decode([i for i in ids if i not in self._starts]).strip()

    def id_of(self, piece: str) -> int | None:
        """Id of a piece; None where there is none."""
        return self._model.token_to_id(piece)

    def to_json(self) -> bytes:
        """A tokenizer.json of it."""
        return self._model.to_str().encode()


def _as_text(text: str | bytes) -> str:
    """As much of a text as is read."""
    return (text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text)[:MAX_CHARACTERS]


def too_long(tokenizer: Tokenizer | SubwordTokenizer, texts: Sequence[str], length: int) -> list[str]:
    """The texts that have more than `length` tokens, the end included."""
    return [text for text in texts if lengths(tokenizer(text, MAX_CHARACTERS)) > length]


def check_whole(tokenizer: Tokenizer | SubwordTokenizer, texts: Sequence[str], length: int) -> None:
    """Raises UserError where a name has more than `length` tokens, so that its likelihood would be another one's."""
    long = too_long(tokenizer, texts, length)
    if long:
        raise UserError(
            f"{len(long)} of {len(texts)} texts have more than the {length} tokens that the model writes, the end "
            f"included; the first is {long[0][:60]!r}."
        )


def _until(end: int, ids) -> list[int]:
    """The ids before the first end, without padding."""
    ids = np.asarray(ids).tolist()
    ids = ids[: ids.index(end)] if end in ids else ids
    return ids[: int(lengths(np.array(ids, np.int32)))]


def _word_piece(path: str, said: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's tokenizer: [CLS] pieces [SEP]; of small letters, unless `said` (its settings) has do_lower_case=false."""
    vocabulary = {piece: i for i, piece in enumerate(split(read_text(path, "Vocabulary")))}
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=said.get("do_lower_case", True),
        strip_accents=said.get("strip_accents"),
        handle_chinese_chars=said.get("tokenize_chinese_chars", True),
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.decoder = tokenizers.decoders.WordPiece()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    model.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return model


_CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")
_CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def _clip_bpe(path: str) -> tokenizers.Tokenizer:
    """CLIP's byte-pair tokenizer (arXiv 2103.00020, section 2.4) from its file of merges."""
    with gzip.open(path) as file:
        lines = split(file.read().decode("utf-8-sig"))[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    if any(len(pair) != 2 for pair in merges):
        raise ValueError("it should hold two pieces a line")
    # The alphabet of bytes in the order of its code points after shifting, printable ones first.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    pieces = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges), *_CLIP_ENDS]
    return _clip({piece: i for i, piece in enumerate(pieces)}, merges)


def _clip_of_hugging_face(path: str) -> tokenizers.Tokenizer:
    """CLIP's tokenizer from vocab.json and merges.txt."""
    vocabulary = json.loads(read_text(path, "Vocabulary"))
    if not isinstance(vocabulary, dict) or not set(_CLIP_ENDS) <= vocabulary.keys():
        raise ValueError(f"it should hold {' and '.join(_CLIP_ENDS)}, as CLIP's")
    lines = split(read_text(str(pathlib.Path(path).with_name("merges.txt")), "Merges"))
    return _clip(vocabulary, [tuple(line.split()) for line in lines if line and not line.startswith("#version")])


def _clip(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    )
    normalizers, pre = tokenizers.normalizers, tokenizers.pre_tokenizers
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    model.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre.Split(tokenizers.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    model.pre_tokenizer = pre.Sequence([words, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.BPEDecoder(suffix="</w>"), tokenizers.decoders.ByteLevel()]
    )
    special = [(name, vocabulary[name]) for name in _CLIP_ENDS]
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{_CLIP_ENDS[0]} $A {_CLIP_ENDS[1]}", special_tokens=special
    )
    return model


_SUBWORDS = (".json", ".txt", ".txt.gz")
COPIES = tuple(f"tokenizer{suffix}" for suffix in (".model", *_SUBWORDS))
"""What a tokenizer's file may be called in a workdir or a converted folder."""


def load(path: str | os.PathLike, start: bool = True) -> Tokenizer | SubwordTokenizer:
    """The tokenizer of a path, loaded once as long as its files stay the same; its suffix says which kind it is.

    Args:
      path: of the file.
      start: whether texts begin with the start id, where the tokenizer has one.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path)
    files = (path, *(os.path.join(folder, name) for name in (SETTINGS, "merges.txt")))
    found = [os.stat(file) for file in files if os.path.isfile(file)]
    return _load(path, start, tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in found))


@functools.cache
def _load(path: str, start: bool, _versions: tuple) -> Tokenizer | SubwordTokenizer:
    return SubwordTokenizer(path, start) if path.endswith(_SUBWORDS) else Tokenizer(path)


def name_of_copy(path: str) -> str:
    """The one of COPIES that says, by its suffix, which kind a tokenizer's file is."""
    return "tokenizer" + next((suffix for suffix in _SUBWORDS if path.endswith(suffix)), ".model")


def copies(path: str, **said: str) -> dict[str, bytes]:
    """The files, by name, of a copy of a tokenizer in a workdir or a converted folder: itself, and its settings if any.

    Args:
      path: of the tokenizer's file; CLIP's vocab.json with its merges.txt becomes one tokenizer.json.
      said: more settings, for its tokenizer_config.json.
    """
    whole = os.path.basename(path) == "vocab.json"
    files = {name_of_copy(path): load(path).to_json() if whole else pathlib.Path(path).read_bytes()}
    values = settings(path) | said
    return files | ({SETTINGS: json.dumps(values, indent=1).encode()} if values else {})


def local(path: epath.Path) -> str:
    """The path of a tokenizer's file as a local one, its settings beside it."""
    copy = storage.local(path)
    beside = path.with_name(SETTINGS)
    if storage.in_bucket(path) and beside.exists():
        beside.copy(os.path.join(os.path.dirname(copy), SETTINGS))
    return copy


def check_same_pieces(path: str, other: str) -> None:
    """Compares what the ids of two tokenizers mean.

    Raises:
      UserError: an id of one means another piece in the other.
    """
    ours, theirs = load(path).pieces(), load(other).pieces()
    if ours == theirs:
        return
    pairs = zip(ours, theirs, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    shown = [repr(pieces[first]) if first < len(pieces) else "nothing" for pieces in (ours, theirs)]
    raise UserError(
        f"Tokenizer {path!r} has another vocabulary than {other!r}: id {first} is {shown[0]} there and {shown[1]} here."
    )


def check_same_texts(path: str, other: str) -> None:
    """Compares what the ids of two tokenizers mean, and how texts are cleaned before.

    Raises:
      UserError: an id of one means another piece in the other, or its `clean` is another.
    """
    check_same_pieces(path, other)
    ours, theirs = (settings(p).get("clean", "") for p in (path, other))
    if ours != theirs:
        raise UserError(
            f"Tokenizer {path!r} has the setting clean={ours!r} and {other!r} clean={theirs!r}: texts would be cleaned "
            f"otherwise than in training; see tokenizer_config.json beside them."
        )
