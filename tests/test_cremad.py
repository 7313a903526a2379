"""Tests of the modalities of CREMA-D: audio from wav files, frames from videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.downloads.ingest import ingest


@pytest.mark.parametrize("sound", [False, True])
def test_cremad_uses_audio_of_wav_and_frames_of_video(
    clip_source: Path, film: Callable[[bool], bytes], tmp_path: Path, sound: bool
) -> None:
    for number, clip in enumerate(["1001_DFA_ANG_XX", "1001_IEO_HAP_HI", "1002_DFA_NEU_XX"]):
        for name, content in (
            (f"AudioWAV/{clip}.wav", (clip_source / f"{number}.wav").read_bytes()),
            (f"VideoFlash/{clip}.mp4", film(sound)),
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
    ingested = ingest("cremad", tmp_path)
    dataset = open_dataset(ingested.path)
    modalities = [str(modality) for modality in dataset.modalities]
    assert modalities == ["audio=audio_file_name:audio", "visual=video_file_name:video"]
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    assert samples.group is not None
    assert samples.group.tolist() == ["1001", "1001", "1002"]
    assert samples.class_names == ("ANG", "HAP", "NEU")
    path = ingested.path.parent / "AudioWAV" / "1001_DFA_ANG_XX.wav"
    assert dataset.load("AudioWAV/1001_DFA_ANG_XX.wav", dataset.modalities[0]) == path.read_bytes()
