"""Decoding and resampling of sound to a waveform (t,), and log-mel spectrograms."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.special import i0

from ..errors import Reason, UnusableError
from .container import (
    MAX_PARTS,
    MIN_PRESENT,
    STREAMED_SIZE,
    count_packets,
    decode_packets,
    open_container,
    reading_container,
    select_stream,
)
from .files import MediaConfig, stft_samples
from .media_file import Medium

SILENT_PEAK = 1e-4  # -80 dBFS: three steps of 16-bit sound, above dither, below any recording
FULL_SCALE = 0.99  # sound with a peak of this or more may be clipped by a converter or an editor
MIN_RUN = 3  # consecutive samples at the peak that count as clipped: a wave that just reaches full scale has one or two
MIN_RATE, MAX_RATE = 1_000, 1_000_000  # Hz
_SAMPLE_TYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}
STEP = 1 / 32_768  # one level of 16-bit sound; samples that differ by less count as equal
_PART_SAMPLES = 16  # output samples of one matrix product of `_filtered`, for each block


def decode_audio(data: Medium, config: MediaConfig, *, sample_rate: int | None = None) -> NDArray[np.float32]:
    """Decode a mono waveform (t,), the mean of the channels, in [-1, 1], at `sample_rate` or config.sample_rate.

    Reads at most config.max_seconds of sound files, or of the first audio track of videos.
    """
    target_rate = sample_rate or config.sample_rate
    with reading_container(data):
        wave, rate = decode_native(data, config)
        peak = float(np.abs(wave).max())
        if not math.isfinite(peak):
            raise UnusableError(Reason.NOT_FINITE, f"{int((~np.isfinite(wave)).sum())} samples are not finite")
        if peak < SILENT_PEAK:
            raise UnusableError(Reason.SILENT, f"peak {peak:.1g} of 1 in {len(wave) / rate:.2f} s")
        clipped_fraction = clipped_share(wave)
        if clipped_fraction > config.max_clipped:
            raise UnusableError(
                Reason.CLIPPED, f"{clipped_fraction:.0%} of {len(wave) / rate:.2f} s are at the peak {peak:.2f}"
            )
        return resample(wave, rate, target_rate)[: max(1, round(config.max_seconds * target_rate))]


def has_sound(data: Medium) -> bool:
    """Return whether a video has an audio track."""
    with reading_container(data), open_container(data, MediaConfig()) as container:
        return len(container.streams.audio) > 0


def decode_native(data: Medium, config: MediaConfig) -> tuple[NDArray[np.float32], int]:
    """Decode mono sound (t,) at the file's own rate; return it with the rate in Hz."""
    return _plain_wave(data, config) or _decoded_wave(data, config)


def _decoded_wave(data: Medium, config: MediaConfig) -> tuple[NDArray[np.float32], int]:
    frame_samples: list[NDArray[Any]] = []
    num_samples, rate, max_samples = 0, 0, math.inf
    with open_container(data, config) as container:
        stream = select_stream(container, "audio", config)
        for frame in decode_packets(count_packets(container.demux(stream), config), stream):
            rate = rate or frame.sample_rate
            if frame.sample_rate != rate:
                raise UnusableError(Reason.CORRUPT, f"the rate changes from {rate} to {frame.sample_rate} Hz")
            _check_rate(rate, frame.layout.nb_channels, config)
            frame_samples.append(_channels(frame))
            num_samples += frame_samples[-1].shape[1]
            max_samples = max(1, math.ceil(config.max_seconds * rate))
            if num_samples >= max_samples:
                break
        # Only flac states its duration exactly, in samples; that of the other formats is an estimate.
        stated_samples = (stream.duration or 0) if container.format.name == "flac" else 0
        if num_samples < min(max_samples, MIN_PRESENT * stated_samples):
            detail = f"the header states {stated_samples} samples, {num_samples} can be decoded"
            raise UnusableError(Reason.TRUNCATED, detail)
    if not num_samples:
        raise UnusableError(Reason.EMPTY, f"no sample can be decoded from {len(data)} bytes")
    return _mono(frame_samples)[: int(min(max_samples, num_samples))], rate


def _check_rate(rate: int, num_channels: int, config: MediaConfig) -> None:
    """Raise UnusableError for an impossible rate, and for more samples per second than the budget allows."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise UnusableError(Reason.CORRUPT, f"the header states {rate} Hz")
    if rate * num_channels > config.max_sound_values:
        limit = f"{config.max_sound_values:,} samples per second (media.max_sound_values)"
        raise UnusableError(Reason.TOO_LARGE, f"{num_channels} channels at {rate} Hz, the maximum is {limit}")


def _plain_wave(data: Medium, config: MediaConfig) -> tuple[NDArray[np.float32], int] | None:
    """Decode 16-bit integer wav, the most common format, as PyAV does; return None for any other file.

    PyAV takes 1.1 ms to open, probe and read half a second of sound, this function 0.03 ms.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    channels = rate = size = 0
    offset = 12
    for _ in range(MAX_PARTS):
        header = data[offset : offset + 24].ljust(24, b"\0")
        name, size = header[:4], int.from_bytes(header[4:8], "little")
        if name == b"fmt ":
            format_code, channels, rate, _, block_bytes, sample_bits = struct.unpack("<HHIIHH", header[8:24])
            if format_code != 1 or sample_bits != 16 or not channels or block_bytes != 2 * channels or not rate:
                return None
        if name == b"data" or offset + 8 > len(data):
            break
        offset += 8 + size + size % 2
    num_samples = min(size, len(data) - offset - 8) // (2 * channels) if channels and offset + 8 <= len(data) else 0
    if num_samples <= 0 or name != b"data" or size >= STREAMED_SIZE:
        return None
    _check_rate(rate, channels, config)
    count = int(min(num_samples, max(1, math.ceil(config.max_seconds * rate))))
    raw = data[offset + 8 : offset + 8 + 2 * count * channels]
    samples = np.frombuffer(raw, "<i2").reshape(-1, channels)
    return np.asarray(samples.mean(axis=1, dtype=np.float32) / 32_768), rate


def _channels(frame: Any) -> NDArray[Any]:
    """Return the raw samples (c, t) of a decoded frame; `to_ndarray` takes 10 microseconds more, 130 times per clip."""
    channels = frame.layout.nb_channels
    if frame.format.is_planar and channels >= 8:  # PyAV 18.1 reads one plane too many and crashes
        import av

        frame = av.AudioResampler(frame.format.packed, frame.layout, frame.sample_rate).resample(frame)[0]
    type_ = _SAMPLE_TYPES[frame.format.packed.name]
    if not frame.format.is_planar:
        return np.frombuffer(frame.planes[0], type_, frame.samples * channels).reshape(-1, channels).T
    if channels == 1:
        return np.frombuffer(frame.planes[0], type_, frame.samples)[None]
    # np.stack takes twice as long, 430 times per 10 s of sound.
    return np.concatenate([np.frombuffer(plane, type_, frame.samples) for plane in frame.planes]).reshape(channels, -1)


def _mono(frame_samples: list[NDArray[Any]]) -> NDArray[np.float32]:
    """Compute the mean (t,) over the channels of all frames (c, t), integers scaled so that full scale is 1."""
    if len({(samples.dtype, len(samples)) for samples in frame_samples}) > 1:  # channels come or go within the file
        return np.concatenate([_mono([samples]) for samples in frame_samples])
    raw = np.concatenate(frame_samples, axis=1)
    if raw.dtype == np.uint8:
        raw = (raw.astype(np.float32) - 128) / 128
    elif raw.dtype.kind == "i":
        raw = raw.astype(np.float32) / -float(np.iinfo(raw.dtype).min)
    return np.asarray(raw[0] if len(raw) == 1 else raw.mean(axis=0), dtype=np.float32)


def resample(wave: NDArray[np.float32], rate: int, target_rate: int) -> NDArray[np.float32]:
    """Resample by a polyphase filter to ceil(t * target_rate / rate) samples.

    PyAV's resampler takes 0.9 ms to set up, this function 0.2 ms in all. Ratios are exact for the usual rates; unusual
    ones are rounded (by one in a million), since the filter would otherwise have millions of taps.
    """
    ratio = Fraction(target_rate, rate).limit_denominator(1_000)
    if ratio != 1:
        wave = _filtered(wave, ratio.numerator, ratio.denominator)
    return np.clip(wave, -1, 1).astype(np.float32, copy=False)


def _filtered(wave: NDArray[np.float32], up: int, down: int) -> NDArray[np.float32]:
    """Compute `scipy.signal.resample_poly` by matrix products over blocks: 10 s at 44.1 kHz take 0.6 ms, not 5."""
    block, step, filter_parts = _blocks(up, down)
    size = -(-len(wave) * up // down)
    num_blocks = -(-size // block)
    padding = -filter_parts[0][0]
    widest = max(len(weights) for _, weights in filter_parts)
    padded = np.zeros(padding + max(step * (num_blocks - 1) + filter_parts[-1][0] + widest, len(wave)), np.float32)
    padded[padding : padding + len(wave)] = wave
    windows = np.lib.stride_tricks.sliding_window_view(padded, widest)
    resampled, column = np.empty((num_blocks, block), np.float32), 0
    for start, weights in filter_parts:
        part_windows = windows[padding + start :: step][:num_blocks, : len(weights)]
        np.matmul(part_windows, weights, out=resampled[:, column : column + weights.shape[1]])
        column += weights.shape[1]
    return resampled.ravel()[:size]


@lru_cache(maxsize=8)
def _blocks(up: int, down: int) -> tuple[int, int, list[tuple[int, NDArray[np.float32]]]]:
    """Return the output samples of a block, the source samples that it advances by, and the filter in parts.

    A part computes up to _PART_SAMPLES output samples from a window of the source: it holds the start of the window
    relative to that of the block, and weights (window, samples). Wider parts would multiply more zeros, narrower ones
    would need more calls.
    """
    repeats = -(-_PART_SAMPLES // up)
    taps = up * _low_pass(max(up, down))
    half = len(taps) // 2
    parts = []
    for block_start in range(0, repeats * up, _PART_SAMPLES):
        block_stop = min(block_start + _PART_SAMPLES, repeats * up)
        positions = down * np.arange(block_start, block_stop) + half  # in the finer grid of up * rate
        start, stop = -((2 * half - int(positions[0])) // up), int(positions[-1]) // up + 1
        tap_index = positions - up * np.arange(start, stop)[:, None]
        is_tap = (tap_index >= 0) & (tap_index < len(taps))
        parts.append((start, np.where(is_tap, taps[np.clip(tap_index, 0, len(taps) - 1)], 0).astype(np.float32)))
    return repeats * up, repeats * down, parts


@lru_cache(maxsize=8)
def _low_pass(steps: int) -> NDArray[np.float32]:
    """Design the filter of `resample_poly`, once per ratio: from 44.1 to 16 kHz it takes 5 of the 7 ms of each call.

    It is scipy.signal.firwin(20 steps + 1, 1 / steps, window=("kaiser", 5.0)), whose import takes 0.8 s and 48 MB of
    each process that decodes sound.
    """
    num_taps, alpha = 20 * steps + 1, 10.0 * steps
    position = np.arange(num_taps) - alpha
    kaiser = i0(5.0 * np.sqrt(1 - (position / alpha) ** 2)) / i0(5.0)
    taps = 1 / steps * np.sinc(1 / steps * position) * kaiser
    return np.asarray(taps / taps.sum(), dtype=np.float32)


def clipped_share(wave: NDArray[np.float32]) -> float:
    """Compute the share of samples (t,), 0 .. 1, in runs of three or more at full scale. The rule is mmaudit's.

    Full scale is the peak of the clip itself, 0.99 or more, of either sign. A sine of 100 Hz at 8 kHz that just reaches
    it has a share of 0, one that is cut off at half its height of two thirds.
    """
    magnitude = np.abs(wave)
    peak = float(magnitude.max())
    if peak < FULL_SCALE:
        return 0.0
    sign_at_peak = np.where(magnitude >= peak - STEP, np.sign(wave), 0)
    starts = np.flatnonzero(np.r_[True, sign_at_peak[1:] != sign_at_peak[:-1]])
    lengths = np.diff(np.r_[starts, len(sign_at_peak)])
    is_clipped = (lengths >= MIN_RUN) & (sign_at_peak[starts] != 0)
    return float(lengths[is_clipped].sum() / len(wave))


Vector = NDArray[np.float32]

FLOOR = 1e-6  # lower bound of the power relative to the strongest band: -60 dB
_BLOCK_WINDOWS = 1 << 14  # transformed at once: an hour of sound would take 1.5 GB in one piece


def log_mel(wave: Vector, config: MediaConfig) -> Vector:
    """Compute the natural log of the power in mel bands (config.mel_bins, frames) of a waveform (t,), 10 ms per frame.

    With scipy: torch.stft with its default threads takes 3.2 ms for half a second, this function 0.3, and no worker
    has to import torch.
    """
    return _log_mel(wave, config.sample_rate, num_bins=config.mel_bins, stft=stft_samples(config.sample_rate))


def _log_mel(wave: Vector, sample_rate: int, *, num_bins: int, stft: tuple[int, int, int]) -> Vector:
    n_fft, window_size, hop = stft
    window, filters = _hann(window_size), _mel_filters(num_bins, sample_rate, n_fft)
    padded = np.pad(wave.astype(np.float32, copy=False), window_size // 2 + 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window_size)[::hop]
    parts = []
    for start in range(0, len(windows), _BLOCK_WINDOWS):
        spectrum = scipy.fft.rfft(windows[start : start + _BLOCK_WINDOWS] * window, n_fft)
        parts.append(filters @ (spectrum.real**2 + spectrum.imag**2).T)
    power = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    floor = max(float(power.max()) * FLOOR, 1e-20)  # the latter for complete silence
    return np.asarray(np.log(np.maximum(power, floor)), dtype=np.float32)


def network_spectrogram(wave: Vector, config: MediaConfig) -> Vector:
    """Compute the spectrogram (bins, t), of `spectrogram_shape`, of the first config.network_seconds of a waveform.

    It is the input of a network. A shorter sound is repeated, as OGM-GE's code does with CREMA-D, or padded.
    """
    size = config.num_network_samples
    pads = config.network_extend == "pad" and len(wave) < size
    wave = np.pad(wave, (0, size - len(wave))) if pads else np.resize(wave, size)  # the latter repeats, or cuts
    if config.network_spectrogram == "log-magnitude":
        return _log_magnitude(wave, config)
    bands = _log_mel(wave, config.sample_rate, num_bins=config.network_mel_bins, stft=config.stft_samples)
    return bands[:, : spectrogram_shape(config)[1]]


def _log_magnitude(wave: Vector, config: MediaConfig) -> Vector:
    """Compute log(|X| + epsilon) (bins, 1 + t // hop) of a waveform (t,): the windows and centring of librosa.stft."""
    n_fft, window_size, hop = config.stft_samples
    left = (n_fft - window_size) // 2
    window = np.pad(_hann(window_size), (left, n_fft - window_size - left))
    mode: Any = {"zero": "constant", "reflect": "reflect"}[config.network_padding]
    padded = np.pad(wave.astype(np.float32, copy=False), n_fft // 2, mode=mode)
    windows = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    num_bins, num_steps = spectrogram_shape(config)
    magnitude = np.abs(scipy.fft.rfft(windows[:num_steps] * window, n_fft)[:, :num_bins])
    return np.ascontiguousarray(np.log(magnitude + np.float32(config.network_epsilon)).T, dtype=np.float32)


def spectrogram_shape(config: MediaConfig) -> tuple[int, int]:
    """Return the shape of a network's spectrogram: bins, and time steps t, one per hop."""
    n_fft, _, hop = config.stft_samples
    num_samples = config.num_network_samples
    if config.network_spectrogram == "log-magnitude":
        return config.network_linear_bins or n_fft // 2 + 1, 1 + num_samples // hop
    return config.network_mel_bins, max(1, num_samples // hop)


@lru_cache(maxsize=8)
def _hann(size: int) -> Vector:
    """Return a periodic Hann window (size,)."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


@lru_cache(maxsize=8)
def _mel_filters(mel_bins: int, sample_rate: int, fft_size: int) -> Vector:
    """Return triangular filters of height 1, (mel_bins, frequencies), 20 Hz to half the rate on HTK's mel scale."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (20, sample_rate / 2))
    edges = 700 * (10 ** (np.linspace(low, high, mel_bins + 2) / 2595) - 1)
    frequencies = np.arange(fft_size // 2 + 1) * (sample_rate / fft_size)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    return np.asarray(np.maximum(0, np.minimum(rising, falling)), dtype=np.float32)
