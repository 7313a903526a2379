"""Frames of videos: still videos are detected, videos with little motion are not."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mmaudit.audit.errors import Reason, UnusableError
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.media.pictures import decode_folders, decode_frames, decode_sized_frames, segment_middles

MEDIA = MediaConfig()


def scene(count: int, *, step: int = 0, light: int = 0) -> NDArray[np.uint8]:
    """Return a smooth picture (count, 64, 64, 3), moved by `step` pixels and brightened by `light` levels per frame."""
    coarse = np.random.default_rng(0).integers(40, 160, (12, 12, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(coarse).resize((64 + 64, 64), Image.Resampling.BICUBIC))
    shifted = [wide[:, step * index : step * index + 64] + np.uint8(light * index) for index in range(count)]
    return np.stack(shifted)


def film(frames: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def is_still(data: bytes, media: MediaConfig = MEDIA) -> bool:
    try:
        decode_frames(data, media)
    except UnusableError as error:
        return error.reason is Reason.STILL and "of 255 levels" in error.detail
    return False


def test_unchanged_picture_for_a_second_is_still() -> None:
    assert is_still(film(scene(25)))
    assert not is_still(film(scene(25, step=1)))


def test_short_clip_and_single_frame_are_not_still() -> None:
    assert not is_still(film(scene(13)))  # 0.48 s from the first to the last frame
    assert is_still(film(scene(14)))  # 0.52 s
    assert not is_still(film(scene(1)))
    assert not is_still(film(scene(25)), MediaConfig(num_frames=1))


def test_change_of_few_levels_is_still() -> None:
    small, large = scene(25), scene(25)
    small[12:] += 5
    large[12:] += 16
    assert is_still(film(small))
    assert not is_still(film(large))


def test_change_in_last_frames_is_motion() -> None:
    frames = scene(32)
    frames[-2:, 20:40, 20:40] = 255
    assert not is_still(film(frames))


@given(count=st.integers(1, 300), num_parts=st.integers(1, 40))
def test_segment_middles_lie_in_equal_parts(count: int, num_parts: int) -> None:
    middles = segment_middles(count, num_parts)
    assert len(middles) == num_parts
    assert middles == sorted(middles)
    for part, middle in enumerate(middles):
        assert part * count / num_parts - 1 < middle < (part + 1) * count / num_parts
    assert 0 <= middles[0] <= middles[-1] < count


def test_frames_in_original_size() -> None:
    frames = np.repeat(scene(10, step=2), 2, axis=2)
    decoded = decode_sized_frames(film(frames), num_frames=10, size=None, config=MediaConfig()).pixels
    assert decoded.shape == (10, 64, 128, 3)
    assert np.abs(decoded.astype(int) - frames).mean() < 6


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("num_frames", [1, 4, 9])
def test_pictures_of_a_folder_are_sampled_evenly(num_frames: int) -> None:
    frames = scene(9, step=4)
    folder = tuple(png(pixels) for pixels in frames)
    decoded = decode_folders((folder,), MediaConfig(num_frames=num_frames))
    np.testing.assert_array_equal(decoded, frames[segment_middles(9, num_frames)])


def test_several_folders_become_colour_channels() -> None:
    grey = [frames.mean(axis=-1).round().astype(np.uint8) for frames in (scene(4, step=4), scene(4, step=7))]
    folders = [tuple(png(pixels) for pixels in frames) for frames in grey]
    two = decode_folders(tuple(folders), MediaConfig(num_frames=4))
    np.testing.assert_array_equal(two, np.stack([*grey, np.full_like(grey[0], 128)], axis=-1))
    three = decode_folders((*folders, folders[0][:2]), MediaConfig(num_frames=4))
    np.testing.assert_array_equal(three[..., 2], grey[0][[0, 0, 1, 1]])


def test_unusable_folders_give_a_reason() -> None:
    good = tuple(png(pixels) for pixels in scene(3, step=4))
    cases: list[tuple[Any, Reason]] = [
        (((),), Reason.EMPTY),
        ((good, ()), Reason.EMPTY),
        ((), Reason.CORRUPT),
        ((good,) * 4, Reason.CORRUPT),
        (((good[0], b"no picture"),), Reason.CORRUPT),
        (((good[0], good[1][:200]),), Reason.TRUNCATED),
        (((png(np.full((9, 9, 3), 7, np.uint8)),),), Reason.CONSTANT),
    ]
    for folders, reason in cases:
        with pytest.raises(UnusableError) as caught:
            decode_folders(folders, MEDIA)
        assert caught.value.reason is reason
