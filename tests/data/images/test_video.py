"""Frames of videos are those that a player shows."""

import fractions
import io

import numpy as np
import pytest
from conftest import case

from capvl.data.images import video

av = pytest.importorskip("av")


def film(rate=(1, 1), frames=12, height=48, width=64) -> bytes:
    """A video whose left half is red, with pixels of the given shape."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.sample_aspect_ratio = fractions.Fraction(*rate)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[:, : width // 2, 0] = 255
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_pixels_that_are_no_squares():
    assert [f.shape for f in video.read_frames(film(), 2)] == [(48, 64, 3)] * 2
    assert [f.shape for f in video.read_frames(film((2, 1)), 2)] == [(48, 128, 3)] * 2


@pytest.mark.cases
def test_a_phones_video_stands_upright():
    path = case("rotated_phone.mp4")
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        stored, degrees = frame.to_ndarray(format="rgb24"), frame.rotation
    assert degrees % 90 == 0
    (shown, *_) = video.read_frames(path, 60)
    np.testing.assert_array_equal(shown, np.rot90(stored, degrees // 90))
    assert shown.shape[:2] == stored.shape[1::-1]


@pytest.mark.cases
def test_hidden_packets_are_no_frames():
    path = case("copied_cut.mp4")
    with av.open(path) as container:
        shown = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    for count in (4, 8, 16, 32, len(shown)):
        frames = video.read_frames(path, count)
        chosen = [shown[int((i + 0.5) * len(shown) / count)] for i in range(count)]
        np.testing.assert_array_equal(np.stack(frames), np.stack(chosen))
    with pytest.raises(video.BadVideoError, match=f"has {len(shown)} frames"):
        video.read_frames(path, len(shown) + 1)
