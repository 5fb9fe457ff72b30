"""Which image-text pairs a data set lets in, and by what two of them count as the same."""

import dataclasses
import functools
import hashlib
import importlib.util
import re

import cv2
import numpy as np

from capvl.data.images.decode import BadImageError, decode, image_size
from capvl.data.reading.rejected import RejectedError
from capvl.data.reading.tars import MAX_BYTES
from capvl.errors import UserError, nearest
from capvl.lines import read_text, split

DUPLICATES = ("image", "text")


@dataclasses.dataclass(frozen=True)
class Filters:
    """What is let in. Every caption of a sample has to pass.

    Attributes:
      min_side: pixels of the shorter side.
      max_aspect: longer / shorter side.
      max_bytes: of one member of a tar.
      min_text, max_text: characters; max_text=0 for no limit.
      languages: ISO 639-1 codes of the captions, such as ("en", "de"); () for all.
      blocklist: words and phrases that no caption may contain, whatever their case, and "url:PART" for parts that
        the image's address (`url` of the JSON) may not contain.
      duplicates: of DUPLICATES: samples with the same perceptual hash, or the same captions, as an earlier one of
        their split are left out.
    """

    min_side: int = 16
    max_aspect: float = 8.0
    max_bytes: int = MAX_BYTES
    min_text: int = 1
    max_text: int = 0
    languages: tuple[str, ...] = ()
    blocklist: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UserError where they make no sense, or a package is missing."""
        if self.min_side < 1 or self.max_aspect < 1 or self.min_text < 0 or self.max_text < 0:
            raise UserError("min_side and max_aspect must be at least 1, min_text and max_text at least 0.")
        for kind in self.duplicates:
            if kind not in DUPLICATES:
                raise UserError(f"Unknown kind of duplicate {kind!r}." + nearest(kind, DUPLICATES))
        if self.languages:
            if not importlib.util.find_spec("py3langid"):
                raise UserError("Telling languages apart needs the package py3langid: pip install -e '.[beam]'.")
            for code in self.languages:
                if code not in _languages():
                    raise UserError(f"Unknown language {code!r}." + nearest(code, _languages()))

    def check_image(self, image: bytes) -> np.ndarray:
        """The decoded image, (H, W, 3) uint8.

        Raises:
          RejectedError: it is not let in.
        """
        try:
            height, width = image_size(image)
            if min(height, width) < self.min_side:
                raise RejectedError("image too small")
            if max(height, width) > self.max_aspect * min(height, width):
                raise RejectedError("extreme aspect ratio")
            return decode(image)
        except BadImageError as e:
            reason = str(e)
            if "bomb" in reason:
                raise RejectedError("decompression bomb") from e
            raise RejectedError("truncated image" if "truncated" in reason else "undecodable image") from e

    def check_texts(self, captions: list[str], url: str) -> None:
        """Raises RejectedError where captions or the image's address are not let in."""
        if not captions[0]:
            raise RejectedError("empty text")
        if min(map(len, captions)) < self.min_text:
            raise RejectedError("text too short")
        if self.max_text and max(map(len, captions)) > self.max_text:
            raise RejectedError("text too long")
        words, parts = _blocked(self.blocklist)
        if words and any(words.search(c) for c in captions):
            raise RejectedError("blocked text")
        if any(part in url for part in parts):
            raise RejectedError("blocked address")
        if self.languages and language(" ".join(captions)) not in self.languages:
            raise RejectedError("another language")

    def hashes(self, pixels: np.ndarray, captions: list[str]) -> dict[str, str]:
        """kind -> hash, of the kinds in `duplicates`; an image whose hash would say nothing has none."""
        made = {"image": lambda: image_hash(pixels), "text": lambda: text_hash(captions)}
        return {kind: value for kind in self.duplicates if (value := made[kind]())}


@functools.lru_cache
def _blocked(blocklist: tuple[str, ...]) -> tuple[re.Pattern | None, list[str]]:
    words = [re.escape(b) for b in blocklist if not b.startswith("url:")]
    pattern = re.compile(rf"(?<!\w)({'|'.join(words)})(?!\w)", re.IGNORECASE) if words else None
    return pattern, [b.removeprefix("url:") for b in blocklist if b.startswith("url:")]


def read_blocklist(path: str) -> tuple[str, ...]:
    """The lines of a file; empty lines and those that begin with # are left out.

    Raises:
      UserError: it can't be read.
    """
    lines = [line.strip() for line in split(read_text(path, "Blocklist"))]
    return tuple(line for line in lines if line and not line.startswith("#"))


def language(text: str) -> str:
    """ISO 639-1 code of a text's most likely language."""
    # Optional.
    import py3langid

    return str(py3langid.classify(text)[0])


@functools.lru_cache
def _languages() -> frozenset[str]:
    # Optional.
    import py3langid

    return frozenset(str(code) for code, _ in py3langid.rank("a"))


def image_hash(pixels: np.ndarray) -> str | None:
    """Difference hash: signs of the 8 x 8 horizontal differences of the grey image at 9 x 8 pixels, as 16 hex digits.

    The same for an image at another size or quality. None where all signs are equal, as of every image of one colour
    and of most gradients: pictures that have nothing in common would share it.
    """
    grey = cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    rises = grey[:, 1:] > grey[:, :-1]
    return np.packbits(rises).tobytes().hex() if rises.any() and not rises.all() else None


def text_hash(captions: list[str]) -> str:
    """Of all captions, whatever their case and spaces."""
    normal = "\n".join(" ".join(c.casefold().split()) for c in captions)
    return hashlib.blake2b(normal.encode(), digest_size=12).hexdigest()
