"""Tests of the spellings of clips, and of the media that are matched with them."""

from __future__ import annotations

import itertools

import pytest

from mmaudit.audit.downloads.names import clip_stem, listed_name, match_media, parse_clip_name, video_of
from mmaudit.audit.errors import DatasetError

VIDEO = "--4-0ihtnB_"  # ids may begin and end with the characters that join the parts of a name
SPELLINGS = [
    f"{VIDEO}{joint}{start}{end and joint + end}"
    for joint, (start, end) in itertools.product(
        "_-", [("30", ""), ("000030", ""), ("30", "40"), ("000030", "000040"), ("30000", "40000"), ("30.0", "40.0")]
    )
] + [VIDEO]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_video_follows_from_every_spelling(spelling: str) -> None:
    assert video_of(spelling) == VIDEO


@pytest.mark.parametrize("name", ["1001_DFA_ANG_XX", "v_YoYo_g08_c01", "one", "abcdefghijkl_3", f"{VIDEO}_3_4_5"])
def test_other_names_are_their_own_video(name: str) -> None:
    assert parse_clip_name(name) is None
    assert video_of(name) == name


@pytest.mark.parametrize("file", SPELLINGS)
@pytest.mark.parametrize("listed", [f"{VIDEO}_000030", f"{VIDEO}_000030_000040"])
def test_clip_is_matched_in_every_spelling(listed: str, file: str) -> None:
    paths = [f"a/{file}.mp4", f"b/{VIDEO}_000031_000041.mp4", "b/abcdefghijk_000030_000040.mp4"]
    assert match_media({listed: ()}, paths).paths == {listed: paths[0]}


def test_seconds_are_preferred_to_milliseconds() -> None:
    paths = [f"{VIDEO}_{start}.mp4" for start in (1, 1000, 2000)]
    listed = [f"{VIDEO}_{start:06d}" for start in (1, 2, 1000)]
    matches = match_media(dict.fromkeys(listed, ()), paths)
    assert matches.paths == dict(zip(listed, [paths[0], paths[2], paths[1]], strict=True))
    (note,) = matches.notes
    assert note == f"1 clips are matched in milliseconds, such as {VIDEO}_000002 with {VIDEO}_2000.mp4"


def test_zero_padded_times_are_seconds() -> None:
    assert match_media({f"{VIDEO}_000005": ()}, [f"{VIDEO}_005000.mp4"]).paths == {}


def test_file_of_the_video_alone_belongs_to_its_only_clip() -> None:
    paths = [f"{VIDEO}.mp4"]
    assert match_media({f"{VIDEO}_000005": ()}, paths).notes[0].startswith("1 clips are matched by the video alone")
    assert match_media({f"{VIDEO}_000005": (), f"{VIDEO}_000050": ()}, paths).paths == {}


def test_ambiguous_files_are_an_error_or_noted() -> None:
    with pytest.raises(DatasetError, match=r"two files with different times fit the clip .*_000030: .*_30_35.*_30_40"):
        match_media({f"{VIDEO}_000030": ()}, [f"{VIDEO}_30_40.mp4", f"{VIDEO}_30_35.mp4"])
    with pytest.raises(DatasetError, match="fits two clips"):
        match_media({f"{VIDEO}_000030_000040": (), f"{VIDEO}_000030_000050": ()}, [f"{VIDEO}_30.mp4"])
    matches = match_media({"x": ("train", "bowling")}, ["large/x.mp4", "small/x.mp4"])
    assert matches.paths == {"x": "large/x.mp4"}
    assert matches.notes == ("1 clips have several files, such as large/x.mp4 and small/x.mp4: the first is read",)


def test_folder_of_split_and_class_decides_between_files_of_one_name() -> None:
    paths = [f"{split}/{label}/x.mp4" for split in ("train", "val") for label in ("bowling", "playing_piano")]
    assert match_media({"x": ("validation", "playing piano")}, paths).paths == {"x": "val/playing_piano/x.mp4"}
    assert match_media({"x": ("train", "bowling")}, paths) == match_media({"x": ("train", "bowling")}, paths[:1])


def test_extension_of_a_medium_is_no_part_of_the_name() -> None:
    assert [clip_stem(path) for path in ("a/x.mp4", "a/x.FLV", "x_30.5_40.5", " x ")] == ["x", "x", "x_30.5_40.5", "x"]
    assert [listed_name(text) for text in ("a\\x.mp4", "../x.mp4", "/x.mp4")] == ["x", "../x.mp4", "/x.mp4"]
