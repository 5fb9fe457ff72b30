"""Frames of video files, decoded as a stream by PyAV: only those that are kept are ever held."""

import io
import os
from typing import Any

import numpy as np

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
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == count:
                break
    if len(frames) < count:
        raise BadVideoError(f"{name} breaks off after {len(frames)} of the {count} frames that are needed.")
    return frames


def _open(video, name: str) -> Any:
    import av

    try:
        container = av.open(io.BytesIO(video) if isinstance(video, bytes) else os.fspath(video))
    except (av.FFmpegError, OSError, ValueError) as e:
        raise BadVideoError(f"{name} can't be read as a video: {e}") from e
    if not container.streams.video:
        container.close()
        raise BadVideoError(f"{name} has no pictures in it.")
    return container


def _count(video, name: str) -> int:
    """Frames of a video: its packets with pictures are counted, not decoded."""
    import av

    with _open(video, name) as container:
        try:
            return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
        except av.FFmpegError as e:
            raise BadVideoError(f"{name} can't be read as a video: {e}") from e


def _decoded(container, name: str):
    import av

    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    try:
        yield from container.decode(stream)
    except av.FFmpegError:
        return  # What came before it was broken may be enough; the caller counts.
