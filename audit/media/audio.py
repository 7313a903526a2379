"""Sound: decoding, resampling, and log-mel spectrograms."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import av
import numpy as np
import scipy.fft
from numpy.typing import NDArray

from ..quarantine import Reason, UnusableError
from .container import count_packets, decode_packets, open_container, select_stream
from .files import MediaConfig, Medium
from .truncation import MAX_PARTS, MIN_HELD, STREAMED_SIZE

SILENT_PEAK = 1e-4  # -80 dBFS: three steps of 16-bit sound, above dither, below any recording
FULL_SCALE = 0.99  # a peak from here on may be where a converter or an editor cut the sound off
LEAST_RUN = 3  # samples in a row at the peak: a wave that only touches full scale has one or two
MIN_RATE, MAX_RATE = 1_000, 1_000_000  # Hz
_SAMPLE_TYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}
STEP = 1 / 32_768  # of 16-bit sound; two samples this close are the same
_AT_ONCE = 16  # samples that one product makes of each block


def decode_native(data: Medium, config: MediaConfig) -> tuple[NDArray[np.float32], int]:
    """Mono sound (t,) at the file's own rate, and that rate in Hz."""
    return _plain_wave(data, config) or _decoded_wave(data, config)


def _decoded_wave(data: Medium, config: MediaConfig) -> tuple[NDArray[np.float32], int]:
    parts: list[NDArray[Any]] = []
    held, rate, wanted = 0, 0, math.inf
    with open_container(data, config) as container:
        stream = select_stream(container, "audio", config)
        for frame in decode_packets(count_packets(container.demux(stream), config), stream):
            rate = rate or frame.sample_rate
            if frame.sample_rate != rate:
                raise UnusableError(Reason.CORRUPT, f"the rate changes from {rate} to {frame.sample_rate} Hz")
            _check_rate(rate, frame.layout.nb_channels, config)
            parts.append(_channels(frame))
            held, wanted = held + parts[-1].shape[1], max(1, math.ceil(config.max_seconds * rate))
            if held >= wanted:
                break
        # Where sizes tell nothing, flac alone states its duration, in samples; that of others is an estimate.
        promised = (stream.duration or 0) if container.format.name == "flac" else 0
        if held < min(wanted, MIN_HELD * promised):
            raise UnusableError(Reason.TRUNCATED, f"the header promises {promised} samples, {held} can be decoded")
    if not held:
        raise UnusableError(Reason.EMPTY, f"no sample can be decoded from {len(data)} bytes")
    return _mono(parts)[: int(min(wanted, held))], rate


def _check_rate(rate: int, num_channels: int, config: MediaConfig) -> None:
    """Raise UnusableError for a rate that no sound has, and for more samples a second than the budget allows."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise UnusableError(Reason.CORRUPT, f"the header states {rate} Hz")
    if rate * num_channels > config.max_sound_values:
        limit = f"{config.max_sound_values:,} samples a second (media.max_sound_values)"
        raise UnusableError(Reason.TOO_LARGE, f"{num_channels} channels at {rate} Hz, at most {limit}")


def _plain_wave(data: Medium, config: MediaConfig) -> tuple[NDArray[np.float32], int] | None:
    """Read the commonest wav, whole numbers of 16 bits, as PyAV would; None for any other file.

    PyAV takes 1.1 ms to open, probe and read half a second of sound, this 0.03.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    channels = rate = size = 0
    at = 12
    for _ in range(MAX_PARTS):
        head = data[at : at + 24].ljust(24, b"\0")
        name, size = head[:4], int.from_bytes(head[4:8], "little")
        if name == b"fmt ":
            code, channels, rate, _, block, bits = struct.unpack("<HHIIHH", head[8:24])
            if code != 1 or bits != 16 or not channels or block != 2 * channels or not rate:
                return None
        if name == b"data" or at + 8 > len(data):
            break
        at += 8 + size + size % 2
    held = min(size, len(data) - at - 8) // (2 * channels) if channels and at + 8 <= len(data) else 0
    if held <= 0 or name != b"data" or size >= STREAMED_SIZE:
        return None
    _check_rate(rate, channels, config)
    count = int(min(held, max(1, math.ceil(config.max_seconds * rate))))
    raw = data[at + 8 : at + 8 + 2 * count * channels]
    samples = np.frombuffer(raw, "<i2").reshape(-1, channels)
    return np.asarray(samples.mean(axis=1, dtype=np.float32) / 32_768), rate


def _channels(frame: Any) -> NDArray[Any]:
    """Samples (c, t) of one decoded frame, as they are; to_ndarray takes 10 microseconds more, 130 times a clip."""
    channels = frame.layout.nb_channels
    if frame.format.is_planar and channels >= 8:  # PyAV 18.1 reads a plane too many: segfault
        frame = av.AudioResampler(frame.format.packed, frame.layout, frame.sample_rate).resample(frame)[0]
    type_ = _SAMPLE_TYPES[frame.format.packed.name]
    if not frame.format.is_planar:
        return np.frombuffer(frame.planes[0], type_, frame.samples * channels).reshape(-1, channels).T
    if channels == 1:
        return np.frombuffer(frame.planes[0], type_, frame.samples)[None]
    # np.stack takes twice as long, 430 times in 10 s.
    return np.concatenate([np.frombuffer(plane, type_, frame.samples) for plane in frame.planes]).reshape(channels, -1)


def _mono(parts: list[NDArray[Any]]) -> NDArray[np.float32]:
    """Mean (t,) of the channels of all frames (c, t), whole numbers scaled so that full scale is 1."""
    if len({(part.dtype, len(part)) for part in parts}) > 1:  # channels come or go within the file
        return np.concatenate([_mono([part]) for part in parts])
    raw = np.concatenate(parts, axis=1)
    if raw.dtype == np.uint8:
        raw = (raw.astype(np.float32) - 128) / 128
    elif raw.dtype.kind == "i":
        raw = raw.astype(np.float32) / -float(np.iinfo(raw.dtype).min)
    return np.asarray(raw[0] if len(raw) == 1 else raw.mean(axis=0), dtype=np.float32)


def resample(wave: NDArray[np.float32], rate: int, goal: int) -> NDArray[np.float32]:
    """Polyphase, ceil(t * goal / rate) samples; PyAV's resampler costs 0.9 ms to set up, this 0.2 ms in all.

    Ratios are exact for the usual rates; odd ones are rounded (a part in a million) lest the filter gets millions long.
    """
    ratio = Fraction(goal, rate).limit_denominator(1_000)
    if ratio != 1:
        wave = _filtered(wave, ratio.numerator, ratio.denominator)
    return np.clip(wave, -1, 1).astype(np.float32, copy=False)


def _filtered(wave: NDArray[np.float32], up: int, down: int) -> NDArray[np.float32]:
    """Do as resample_poly does, as one product for each few samples of a block: 10 s at 44.1 kHz take 0.6 ms, not 5."""
    block, step, parts = _blocks(up, down)
    size = -(-len(wave) * up // down)
    num_blocks = -(-size // block)
    before = -parts[0][0]
    widest = max(len(weights) for _, weights in parts)
    padded = np.zeros(before + max(step * (num_blocks - 1) + parts[-1][0] + widest, len(wave)), np.float32)
    padded[before : before + len(wave)] = wave
    windows = np.lib.stride_tricks.sliding_window_view(padded, widest)
    found, at = np.empty((num_blocks, block), np.float32), 0
    for start, weights in parts:
        there = windows[before + start :: step][:num_blocks, : len(weights)]
        np.matmul(there, weights, out=found[:, at : at + weights.shape[1]])
        at += weights.shape[1]
    return found.ravel()[:size]


@lru_cache(maxsize=8)
def _blocks(up: int, down: int) -> tuple[int, int, list[tuple[int, NDArray[np.float32]]]]:
    """Samples in a block, those of the source that it advances by, and the filter in parts.

    A part makes up to _AT_ONCE samples from a window of the source: where that starts, seen from the block's own start,
    and weights (window, samples). Wider parts would multiply more zeros, narrower ones would take more calls.
    """
    repeats = -(-_AT_ONCE // up)
    taps = up * _low_pass(max(up, down))
    half = len(taps) // 2
    parts = []
    for first in range(0, repeats * up, _AT_ONCE):
        places = down * np.arange(first, min(first + _AT_ONCE, repeats * up)) + half  # in the finer grid of up * rate
        start, stop = -((2 * half - int(places[0])) // up), int(places[-1]) // up + 1
        tap = places - up * np.arange(start, stop)[:, None]
        inside = (tap >= 0) & (tap < len(taps))
        parts.append((start, np.where(inside, taps[np.clip(tap, 0, len(taps) - 1)], 0).astype(np.float32)))
    return repeats * up, repeats * down, parts


@lru_cache(maxsize=8)
def _low_pass(steps: int) -> NDArray[np.float32]:
    """The filter that resample_poly designs anew at every call: from 44.1 to 16 kHz that takes 5 ms of 7."""
    from scipy.signal import firwin  # here: it takes 65 MB, and every command reads what a config of media is

    return np.asarray(firwin(20 * steps + 1, 1 / steps, window=("kaiser", 5.0)), dtype=np.float32)


def clipped_share(wave: NDArray[np.float32]) -> float:
    """Share of the samples (t,), 0 .. 1, in runs of three or more that stand at full scale. The rule is ours.

    Full scale is the clip's own peak of 0.99 or more, upwards or downwards; a sine that just reaches it, of 100 Hz at
    8 kHz, has a share of 0; cut off at half its height, of two thirds.
    """
    size = np.abs(wave)
    peak = float(size.max())
    if peak < FULL_SCALE:
        return 0.0
    full = np.where(size >= peak - STEP, np.sign(wave), 0)
    starts = np.flatnonzero(np.r_[True, full[1:] != full[:-1]])
    lengths = np.diff(np.r_[starts, len(full)])
    long = (lengths >= LEAST_RUN) & (full[starts] != 0)
    return float(lengths[long].sum() / len(wave))


Vector = NDArray[np.float32]

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
FLOOR = 1e-6  # of the strongest band: 60 dB below it everything counts as equally quiet


def log_mel(wave: Vector, config: MediaConfig) -> Vector:
    """Natural log of the power in mel bands (config.mel_bins, frames), a frame each 10 ms, of a waveform (t,).

    By scipy: torch.stft in its default threads takes 3.2 ms for half a second, this 0.3, and so no worker loads torch.
    """
    window = _window(config.sample_rate)
    padded = np.pad(wave.astype(np.float32, copy=False), len(window) // 2 + 1)
    frames = np.lib.stride_tricks.sliding_window_view(padded, len(window))[:: _hop(config.sample_rate)]
    spectrum = scipy.fft.rfft(frames * window, _fft_size(len(window)))
    power = _mel_filters(config.mel_bins, config.sample_rate) @ (spectrum.real**2 + spectrum.imag**2).T
    floor = max(float(power.max()) * FLOOR, 1e-20)  # the second for what is wholly silent
    return np.asarray(np.log(np.maximum(power, floor)), dtype=np.float32)


def network_spectrogram(wave: Vector, config: MediaConfig) -> Vector:
    """Log-mel bands (config.network_mel_bins, t) of the first config.network_seconds of a waveform, for a network.

    A shorter sound is said again until the time is full, as OGM-GE's code does with CREMA-D.
    """
    wave = np.resize(wave, round(config.network_seconds * config.sample_rate))  # repeats, or cuts
    bands = log_mel(wave, replace(config, mel_bins=config.network_mel_bins))
    return bands[:, : network_steps(config)]


def network_steps(config: MediaConfig) -> int:
    """Count the steps in time t of a network's spectrogram: one a hundredth of a second."""
    return max(1, round(config.network_seconds * config.sample_rate) // _hop(config.sample_rate))


def _hop(sample_rate: int) -> int:
    return max(1, round(HOP_SECONDS * sample_rate))


@lru_cache(maxsize=8)
def _window(sample_rate: int) -> Vector:
    size = max(2, round(WINDOW_SECONDS * sample_rate))
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)  # periodic Hann


def _fft_size(window_size: int) -> int:
    return 1 << (window_size - 1).bit_length()


@lru_cache(maxsize=8)
def _mel_filters(mel_bins: int, sample_rate: int) -> Vector:
    """Triangles of height 1 (mel_bins, frequencies) from 20 Hz to half the rate, on HTK's scale."""
    size = _fft_size(len(_window(sample_rate)))
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (20, sample_rate / 2))
    edges = 700 * (10 ** (np.linspace(low, high, mel_bins + 2) / 2595) - 1)
    frequencies = np.arange(size // 2 + 1) * (sample_rate / size)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    return np.asarray(np.maximum(0, np.minimum(rising, falling)), dtype=np.float32)
