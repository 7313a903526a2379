"""Adapters: which downloads are known, by which name?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .ave import read_ave
from .clips import Listing
from .cremad import read_cremad
from .image_text import read_image_text
from .mosei import read_mosei
from .ogm_ge import read_ogm_ge
from .ucf101 import read_ucf101
from .youtube import read_kinetics_sounds, read_vggsound


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One download: what it looks like, for help texts, and the function of (folder, lists) that reads it."""

    expects: str
    read: Callable[[Path, Sequence[Path]], Listing]


ADAPTERS: dict[str, Adapter] = {
    "cremad": Adapter(expects="CREMA-D: AudioWAV/*.wav, VideoFlash/*.flv", read=read_cremad),
    "ave": Adapter(expects="AVE: AVE/*.mp4, trainSet.txt, valSet.txt, testSet.txt", read=read_ave),
    "kinetics-sounds": Adapter(
        expects="Kinetics-Sounds: lists with label,youtube_id,time_start,time_end,split and clips anywhere below",
        read=read_kinetics_sounds,
    ),
    "vggsound": Adapter(expects="VGGSound: vggsound.csv and clips anywhere below", read=read_vggsound),
    "ucf101": Adapter(
        expects="UCF-101 as frames: ucfTrainTestlist/, jpegs_256/, tvl1_flow/u/, tvl1_flow/v/", read=read_ucf101
    ),
    "mosei": Adapter(expects="CMU-MOSEI or CMU-MOSI features: one .pkl, or .npz files", read=read_mosei),
    "image-text": Adapter(
        expects="pictures with texts: csv, tsv or jsonl with columns for image, text and label", read=read_image_text
    ),
    "ogm-ge": Adapter(
        expects="the lists of the OGM-GE code: train.csv, test.csv, AudioWAV/ or audio/, Image-01-FPS/ or visual/",
        read=read_ogm_ge,
    ),
}
