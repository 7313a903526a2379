"""Downloads for `ingest`: pickles and npz of features, and the lists of the adapters."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from .mutate import EDGE_TEXTS, encode_oddly, mutate_bytes, mutate_text, nested
from .seeds import Seeds, mosei_fields


def pickles(rng: Random, seeds: Seeds) -> list[str]:
    """Write a pickle or an npz with odd fields, bytes or opcodes, and ingest it."""
    roll = rng.random()
    if roll < 0.25:
        Path("x.pkl").write_bytes(mutate_bytes(rng, seeds.data("mosei.pkl")))
    elif roll < 0.5:
        Path("x.pkl").write_bytes(pickle.dumps(_odd_splits(rng), protocol=rng.choice((0, 2, 4, 5))))
    elif roll < 0.7:
        Path("x.pkl").write_bytes(_opcodes(rng, seeds.data("mosei.pkl")))
    elif roll < 0.85:
        Path("train.npz").write_bytes(mutate_bytes(rng, seeds.data("mosei-train.npz")))
    else:
        _write_npz(rng, Path("train.npz"))
    return ["ingest", "mosei", ".", "--out", "o.parquet", *(["--json"] if rng.random() < 0.3 else [])]


def _odd_splits(rng: Random) -> Any:
    """Return what a pickle of splits should hold, with one to three fields or keys of other types and shapes."""
    content: dict[Any, Any] = {part: mosei_fields(4) for part in ("train", "valid", "test")}
    for _ in range(rng.choice((1, 1, 2, 3))):
        part = rng.choice(list(content))
        if rng.random() < 0.15:
            content[rng.choice((part, 1, None, "x", b"train", ("a",), "traintest"))] = _odd_field(rng)
        elif isinstance(content[part], dict) and content[part]:
            content[part][rng.choice([*content[part], "x", 3])] = _odd_field(rng)
    return content if rng.random() < 0.95 else _odd_field(rng)


def _odd_field(rng: Random) -> Any:
    values: tuple[Any, ...] = (
        None, 0, 10**400, True, "text", b"bytes", [], {}, (), set(), [1, [2]], [None] * 4, ["a"] * 4, {"a": 1},
        nested(300),
        list(rng.choice(EDGE_TEXTS) for _ in range(4)), [[0.0] * 3] * 4, [[0.0], [0.0, 1.0], [], [1.0]],
        np.float32(1), np.zeros(0), np.zeros((4, 0, 3)), np.zeros((4, 2, 3)), np.full((4, 2, 3), np.nan),
        np.zeros((4, 2, 3, 1)),
        np.full((4, 3), np.inf), np.full(4, 1e300), np.array(["a", "b", "c", "d"]), np.array([b"a"] * 4),
        np.array([None, 1, "a", []], dtype=object), np.array([np.zeros(2), np.zeros(3), None, 1], dtype=object),
        np.zeros(4, dtype=np.complex128), np.zeros(4, dtype="datetime64[s]"), np.zeros(4, dtype=[("a", "i4")]),
        np.zeros((4, 3), dtype=np.int8, order="F"), np.array(5), np.full(4, 2**63, dtype=np.uint64),
        np.full((4, 3), -1),
        np.broadcast_to(np.zeros(1, dtype=np.int8), (4, 3)), np.array([["a", "b"]] * 4), np.zeros((0, 5, 4)), range(4),
    )  # fmt: skip
    return rng.choice(values)


CALLABLES = (
    "os system", "builtins eval", "numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype",
    "_codecs encode", "collections OrderedDict", "builtins bytearray", "builtins list",
    "mmaudit.audit.storage write_text",
)  # fmt: skip
ARGUMENTS = (
    b")", b"(X\x02\x00\x00\x00idt", b"(K\x05t", b"(\x8a\x05\xff\xff\xff\xff\x7ft", b"(}t", b"(]t", b"N", b"(NNt",
)  # fmt: skip


def _opcodes(rng: Random, valid: bytes) -> bytes:
    """Return a pickle of opcodes that build much of little, go deep, call names, or come in a wrong order."""
    level = rng.choice((10, 26, 30, 1000, 50_000))
    laughs = b"\x80\x02]q\x00" + b"".join(
        b"]q" + bytes([min(n + 1, 255)]) + b"(" + (b"h" + bytes([min(n, 254)])) * 2 + b"e"
        for n in range(min(level, 200))
    )
    call = rng.choice(CALLABLES).replace(" ", "\n").join(("c", "\n")).encode() + rng.choice(ARGUMENTS) + b"R"
    programs = (
        laughs + b".",
        b"\x80\x02}X\x05\x00\x00\x00train" + laughs[2:] + b"s.",
        b"\x80\x02" + b"]" * level + b"a" * level + b".",
        b"\x80\x02" + b"(" * level + b"t" * level + b".",
        b"\x80\x02" + b"}" + b"(K\x01" * min(level, 2000) + b"}u" * min(level, 2000) + b".",
        b"\x80\x02" + call + b".",
        b"\x80\x02" + call + rng.choice((b"}b.", b"(NNNNNtb.", b"(K\x01(K\x02tNK\x00C\x02abtb.")),
        b"\x80\x04\x95" + struct.pack("<Q", rng.choice((0, 2**40, 2**63))) + b"N.",
        b"\x80\x05\x96" + struct.pack("<Q", rng.choice((5, 2**33, 2**63))) + b"abcde.",
        b"\x80\x02\x8b" + struct.pack("<i", rng.choice((4, -1, 2**31 - 1))) + b"\xff\xff\xff\x7f.",
        b"I" + b"9" * rng.choice((100, 5000, 300_000)) + b"\n.",
        b"\x80\x02]r" + struct.pack("<I", rng.choice((1, 2**31))) + b".",
        bytes(rng.choice(valid) for _ in range(200)),
        b"\x80\x02"
        + bytes(rng.choice(b"()]}lteauNRbhqKX.0123\x85\x86\x87\x88\x93\x94") for _ in range(rng.choice((5, 20, 80))))
        + b".",
    )
    return rng.choice(programs)


def _write_npz(rng: Random, path: Path) -> None:
    """Write an npz whose arrays announce other shapes and types than they hold, or expand to much."""
    fields = dict(mosei_fields(4))
    for _ in range(rng.choice((1, 1, 2))):
        fields[rng.choice([*fields, "split", "x"])] = np.asarray(
            rng.choice(
                (
                    np.zeros(0),
                    np.zeros(4),
                    np.array(1),
                    np.array(["a"] * 4),
                    np.zeros((4, 2, 2, 2)),
                    np.zeros(4, dtype="V8"),
                )
            )
        )
    with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, value in fields.items():
            file = io.BytesIO()
            np.save(file, value, allow_pickle=False)
            data = file.getvalue()
            roll = rng.random()
            if roll < 0.1:
                data = mutate_bytes(rng, data, high=128)
            elif roll < 0.15:
                shape = rng.choice(("(4, 1000000000)", "(99999999999999999999,)", "(-1,)", "(4, 5000, 4000)", "()"))
                data = _npy_header(shape, rng.choice(("<f4", "|O", "<U1000000000", "|V0", "<f2"))) + bytes(100)
            elif roll < 0.17:
                data = _npy_header("(4, 5000, 10000)", "|i1") + bytes(200_000_000)
            archive.writestr(name + rng.choice((".npy", ".npy", ".npy", "")), data)


def _npy_header(shape: str, dtype: str) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def lists(rng: Random, seeds: Seeds) -> list[str]:
    """Write a small download of one of the adapters, with its lists damaged, and ingest it."""
    name, write_download = rng.choice(_DOWNLOADS)
    paths = write_download(seeds)
    for _ in range(rng.choice((1, 1, 2))):
        path = Path(rng.choice(paths))
        text = path.read_text(encoding="utf-8", errors="replace")
        if rng.random() < 0.6:
            path.write_text(mutate_text(rng, text), encoding="utf-8", errors="surrogatepass")
        else:
            path.write_bytes(encode_oddly(rng, text))
    options = [part for path in paths for part in ("--list", path)] if rng.random() < 0.3 else []
    return ["ingest", name, ".", *options, *(["--json"] if rng.random() < 0.3 else [])]


def _write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    return path


def _copy(seeds: Seeds, seed: str, *paths: str) -> None:
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(seeds.path(seed), path)


def _cremad(seeds: Seeds) -> list[str]:
    clips = ["1001_DFA_ANG_XX", "1002_IEO_SAD_HI", "1003_TIE_HAP_X"]
    for clip in clips:
        _copy(seeds, "media/audio/0.wav", f"AudioWAV/{clip}.wav")
        _copy(seeds, "formats/x.mp4", f"VideoFlash/{clip}.flv")
    text = "".join(f"{clip},{clip.split('_')[2]}\n" for clip in clips)
    return [_write("train.csv", text), _write("test.csv", text[:20] + "\n")]


def _ave(seeds: Seeds) -> list[str]:
    _copy(seeds, "formats/x.mp4", "AVE/abc.mp4", "AVE/def.mp4")
    lines = "Category&VideoID&Quality&StartTime&EndTime\nBark&abc&good&0&10\nChurch bell&def&good&2&5\n"
    return [_write(f"{part}Set.txt", lines) for part in ("train", "val", "test")]


def _kinetics(seeds: Seeds) -> list[str]:
    _copy(seeds, "formats/x.mp4", "clips/abcdefghijk_000001_000011.mp4")
    lines = "label,youtube_id,time_start,time_end,split\nbowling,abcdefghijk,1,11,train\nsinging,bbcdefghijk,5,15,val\n"
    return [_write("train.csv", lines)]


def _vggsound(seeds: Seeds) -> list[str]:
    _copy(seeds, "formats/x.mp4", "video/---g-f_I2yQ_000001.mp4")
    return [_write("vggsound.csv", "---g-f_I2yQ,1,people marching,test\nabcdefghijk,30,dog barking,train\n")]


def _ucf101(seeds: Seeds) -> list[str]:
    for number, folder in enumerate(("jpegs_256", "tvl1_flow/u", "tvl1_flow/v")):
        _copy(seeds, f"media/image/{number}.png", f"{folder}/v_Archery_g01_c01/frame000001.png")
    list_folder = "ucfTrainTestlist"
    return [
        _write(f"{list_folder}/classInd.txt", "1 Archery\n2 Biking\n"),
        _write(f"{list_folder}/trainlist01.txt", "Archery/v_Archery_g01_c01.avi 1\nBiking/v_Biking_g02_c01.avi 2\n"),
        _write(f"{list_folder}/testlist01.txt", "Archery/v_Archery_g03_c01.avi\n"),
    ]


def _image_text_csv(seeds: Seeds) -> list[str]:
    return [
        _write(
            "list.csv", "id,image,text,label,split\n" + "".join(",".join(row.values()) + "\n" for row in _pairs(seeds))
        )
    ]


def _image_text_jsonl(seeds: Seeds) -> list[str]:
    return [_write("train.jsonl", "\n".join(json.dumps(row) for row in _pairs(seeds)))]


def _pairs(seeds: Seeds) -> list[dict[str, str]]:
    _copy(seeds, "media/image/0.png", "images/a.png", "images/b.png")
    return [{"id": name, "image": f"{name}.png", "text": f"a {name}", "label": name, "split": "train"} for name in "ab"]


def _ogm_ge(seeds: Seeds) -> list[str]:
    _copy(seeds, "media/audio/0.wav", "audio/abcdefghijk_1.wav")
    _copy(seeds, "media/image/0.png", "visual/abcdefghijk_1/1.png")
    lines = "abcdefghijk_1,10,bowling\nbbcdefghijk_2,10,singing\n"
    return [_write("train.csv", lines), _write("test.csv", lines), _write("stat.csv", "bowling\nsinging\n")]


_DOWNLOADS: tuple[tuple[str, Callable[[Seeds], list[str]]], ...] = (
    ("cremad", _cremad),
    ("ave", _ave),
    ("kinetics-sounds", _kinetics),
    ("vggsound", _vggsound),
    ("ucf101", _ucf101),
    ("image-text", _image_text_csv),
    ("image-text", _image_text_jsonl),
    ("ogm-ge", _ogm_ge),
)
