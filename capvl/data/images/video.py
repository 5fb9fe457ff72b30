"""Frames of video files as a player shows them, decoded as a stream by PyAV: only those that are kept are ever held."""

import io
import os
from typing import Any

import numpy as np

from capvl.data.images.decode import resize
from capvl.errors import UserError

SUFFIXES = ("mp4", "avi", "mkv", "mov", "webm", "m4v", "mpg", "mpeg", "gif")


class BadVideoError(UserError):
    """The bytes are not a video that can be used; the message says why."""


def read_frames(video: str | os.PathLike | bytes, count: int) -> list[np.ndarray]:
    """`count` frames (H, W, 3) uint8 RGB, each from the middle of one of as many equal parts of a video.

    Args:
      video: path or bytes of a file.
      count: at least 1.

    Raises:
      BadVideoError: missing, no video, or one of fewer frames.
    """
    name = "The video" if isinstance(video, bytes) else f"Video {os.fspath(video)!r}"
    if not isinstance(video, bytes) and not os.path.isfile(video):
        raise BadVideoError(f"{name} does not exist.")
    total = _count(video, name)
    if total < count:
        raise BadVideoError(f"{name} has {total} frames, and {count} are needed.")
    wanted = [int((i + 0.5) * total / count) for i in range(count)]
    frames: list[np.ndarray] = []
    with _open(video, name) as container:
        for number, frame in enumerate(_decoded(container, name)):
            while len(frames) < count and wanted[len(frames)] == number:
                frames.append(_shown(frame, _stream(container)))
            if len(frames) == count:
                break
    if len(frames) < count:
        raise BadVideoError(f"{name} breaks off after {len(frames)} of the {count} frames that are needed.")
    return frames


def _open(video, name: str) -> Any:
    # Slow to import.
    import av

    try:
        container = av.open(io.BytesIO(video) if isinstance(video, bytes) else os.fspath(video))
    except (av.FFmpegError, OSError, ValueError) as e:
        raise BadVideoError(f"{name} can't be read as a video: {e}") from e
    if _stream(container) is None:
        container.close()
        raise BadVideoError(f"{name} has no pictures in it.")
    return container


def _stream(container) -> Any:
    """The first stream of pictures that is no cover of a sound file; None where there is none."""
    # Slow to import.
    import av

    cover = av.stream.Disposition.attached_pic
    return next((s for s in container.streams.video if not s.disposition & cover), None)


def _shown(frame, stream) -> np.ndarray:
    """A frame (H, W, 3) uint8 as a player shows it: with square pixels, turned and mirrored by its display matrix."""
    pixels, shape = frame.to_ndarray(format="rgb24"), stream.sample_aspect_ratio
    if shape and shape != 1:
        height, width = pixels.shape[:2]
        pixels = resize(pixels, height, max(1, round(width * shape)))
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return pixels
    # Pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift.
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    pixels = pixels[::-1] if d < 0 else pixels
    return np.ascontiguousarray(pixels[:, ::-1] if a < 0 else pixels)


def _count(video, name: str) -> int:
    """Frames that a player shows: packets are counted, not decoded; those that an edit list hides are not shown."""
    # Slow to import.
    import av

    with _open(video, name) as container:
        try:
            return sum(1 for p in container.demux(_stream(container)) if p.size and not p.is_discard)
        except av.FFmpegError as e:
            raise BadVideoError(f"{name} can't be read as a video: {e}") from e


def _decoded(container, name: str):
    # Slow to import.
    import av

    stream = _stream(container)
    stream.thread_type = "AUTO"
    try:
        yield from container.decode(stream)
    except av.FFmpegError:
        return  # What came before it was broken may be enough; the caller counts.
