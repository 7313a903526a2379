"""Adapters that read the official downloads of datasets into one table of clips; one file per adapter."""

from __future__ import annotations

from ..registry import Entry, Registry

DOWNLOADS = Registry(
    {
        "cremad": Entry("cremad:read_cremad", "CREMA-D: AudioWAV/*.wav, VideoFlash/*.flv"),
        "ave": Entry("ave:read_ave", "AVE: AVE/*.mp4, trainSet.txt, valSet.txt, testSet.txt"),
        "kinetics-sounds": Entry(
            "youtube:read_kinetics_sounds",
            "Kinetics-Sounds: lists with label,youtube_id,time_start,time_end,split and clips anywhere below",
        ),
        "vggsound": Entry(
            "youtube:read_vggsound", "VGGSound: vggsound.csv, or train.csv and test.csv, and clips anywhere below"
        ),
        "ucf101": Entry(
            "ucf101:read_ucf101", "UCF-101 as frames: ucfTrainTestlist/, jpegs_256/, tvl1_flow/u/, tvl1_flow/v/"
        ),
        "mosei": Entry("mosei:read_mosei", "CMU-MOSEI or CMU-MOSI features: one .pkl, or .npz files"),
        "image-text": Entry(
            "image_text:read_image_text",
            "pictures with texts: csv, tsv or jsonl with columns for image, text and label",
        ),
        "mvsa": Entry("mvsa:read_mvsa", "MVSA-Single or MVSA-Multiple: labelResultAll.txt, data/ID.jpg, data/ID.txt"),
        "ogm-ge": Entry(
            "ogm_ge:read_ogm_ge",
            "the lists of the OGM-GE code: train.csv, test.csv, AudioWAV/ or audio/, Image-01-FPS/ or visual/",
        ),
    },
    package=__name__,
    group="mmaudit.downloads",
    option="ingest",
)
