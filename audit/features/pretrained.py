"""Pretrained encoders: frozen transformers models, local or from the hub.

Any transformers model whose input is prepared by AutoFeatureExtractor, AutoImageProcessor or AutoTokenizer. The vector
is the first available of: the projected features of a two-tower model (CLIP, CLAP); `pooler_output`, if the weights
contain the pooler; the mean of `last_hidden_state` over all tokens, for texts over all tokens but padding.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import ConfigError
from ..hashing import digest
from ..media.audio import decode_audio
from ..media.files import MediaConfig
from ..media.pictures import decode_sized_folders, decode_sized_frames, decode_sized_image
from ..storage import file_stamp
from ..workers import parallel_map
from .vectors import text_words

_DOWNLOADED_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # no pickled weights, no code


def find_model_folder(name: str, *, with_weights: bool) -> Path:
    """Return a model's folder: `name` itself, or the download of a hub name, optionally with `@revision`.

    Downloads only the config, or all files if `with_weights`. Raises ConfigError if the model is not available.
    """
    folder = local_folder(name)
    if folder is None:
        return _hub_folder(name, with_weights)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"folder {name} has no config.json: it is not a transformers model")
    return folder


def local_folder(name: str) -> Path | None:
    """Return the local folder of this name; None if it does not exist, as for a name on the hub."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None


@lru_cache(maxsize=16)
def _hub_folder(name: str, with_weights: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    model, _, revision = name.partition("@")
    try:
        if with_weights:
            return Path(snapshot_download(model, revision=revision or None, allow_patterns=list(_DOWNLOADED_FILES)))
        return Path(hf_hub_download(model, "config.json", revision=revision or None)).parent
    except (OSError, ValueError) as error:  # the two base classes of huggingface_hub's errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"no local folder {name!r}, and the hub has no such model: {reason}") from error


def folder_version(folder: Path) -> str:
    """Return the version of a model: its commit on the hub, else the digest of its files, independent of the path."""
    if folder.parent.name == "snapshots":
        return folder.name
    files = sorted(path for path in folder.iterdir() if f"*{path.suffix}" in _DOWNLOADED_FILES)
    return _files_digest(tuple((path, file_stamp(path)) for path in files))


@lru_cache(maxsize=16)
def _files_digest(files: tuple[tuple[Path, object], ...]) -> str:
    """Return the digest of these files, cached until a stamp changes: 350 MB of weights take half a second."""
    return digest(*(part for path, _ in files for part in (path.name.encode(), path.read_bytes())))


log = logging.getLogger("mmaudit")

VERSION = 1  # increased when the same model and input would produce another vector
MAX_BATCH_INPUTS = 32  # waveforms, images or texts; each frame of a clip counts
MIN_SECONDS = 0.1  # audio is padded to this length: wav2vec2 needs at least 25 ms
INSTALL_HINT = 'transformers is not installed: pip install "mmaudit[hf]"'
_FRAME_SIZE = 256  # pixels of the squares that frames of a folder are scaled to: they may differ in size

_OPEN_LOCK = threading.Lock()

ModelInputs = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputProcessor:
    """What makes a sample the input of a model, by its transformers processor, `transform`.

    num_frames: None for a network of single images. max_tokens: most tokens of a text.
    """

    kind: str
    transform: Any
    num_frames: int | None
    max_tokens: int

    def prepare(self, loaded: Any, media: MediaConfig) -> ModelInputs:
        """Decode a sample and convert it to model inputs without a batch dimension. Thread-safe."""
        if self.kind == "text":
            text_words(loaded)  # raises for a text without words
            return dict(self.transform(loaded, truncation=True, max_length=self.max_tokens, return_tensors=None))
        if self.kind == "audio":
            return self.from_wave(decode_audio(loaded, media, sample_rate=self.sample_rate))
        return self.from_pictures(self.pictures(loaded, media))

    @property
    def sample_rate(self) -> int:
        """Sample rate of a model of sound, in Hz."""
        return int(self.transform.sampling_rate)

    def from_wave(self, wave: NDArray[np.float32]) -> ModelInputs:
        """Convert a waveform (t,) at `sample_rate`."""
        wave = np.pad(wave, (0, max(0, round(MIN_SECONDS * self.sample_rate) - len(wave))))
        return _drop_batch(self.transform(wave, sampling_rate=self.sample_rate, return_tensors="np"))

    def from_pictures(self, pictures: NDArray[np.uint8], **options: Any) -> ModelInputs:
        """Convert an image (1, h, w, 3), or the frames (f, h, w, 3) of a clip. options: of the processor."""
        images = [Image.fromarray(picture) for picture in pictures]
        if self.kind == "image":
            return _drop_batch(self.transform(images=images, return_tensors="np", **options))
        if self.num_frames:
            return _drop_batch(self.transform([images], return_tensors="np", **options))
        return dict(self.transform(images=images, return_tensors="np", **options))

    def pictures(self, loaded: Any, media: MediaConfig) -> NDArray[np.uint8]:
        """Decode an image (1, h, w, 3), or the frames (f, h, w, 3) of a clip."""
        if self.kind == "image":
            return decode_sized_image(loaded, size=None, config=media).pixels[None]
        num_frames = self.num_frames or media.num_frames
        if self.kind == "frames":
            return decode_sized_folders(loaded, num_frames=num_frames, size=_FRAME_SIZE, config=media).pixels
        return decode_sized_frames(loaded, num_frames=num_frames, size=None, config=media).pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """A frozen model and its processor."""

    processor: InputProcessor
    model: Any
    has_pooler: bool
    device: str

    @property
    def kind(self) -> str:
        """Kind of modality."""
        return self.processor.kind

    def batch_size(self, media: MediaConfig) -> int:
        """Return how many samples are encoded at once."""
        frames = (self.processor.num_frames or media.num_frames) if self.kind in ("video", "frames") else 1
        return max(1, MAX_BATCH_INPUTS // frames)

    def prepare(self, loaded: Any, media: MediaConfig) -> ModelInputs:
        """See InputProcessor.prepare."""
        return self.processor.prepare(loaded, media)

    def encode(self, batch: Sequence[ModelInputs]) -> NDArray[np.float32]:
        """Compute the vectors (b, d) of prepared samples; except for texts all inputs must have the same shape."""
        import torch

        if self.kind == "text":
            inputs = dict(self.processor.transform.pad(list(batch), return_tensors="pt"))
        else:
            inputs = {name: torch.from_numpy(np.stack([sample[name] for sample in batch])) for name in batch[0]}
        by_frame = self.kind in ("video", "frames") and not self.processor.num_frames
        if by_frame:
            inputs = {name: value.flatten(0, 1) for name, value in inputs.items()}
        with torch.no_grad():
            inputs = {name: value.to(self.device) for name, value in inputs.items()}
            vectors = pooled_output(self.model, inputs, kind=self.kind, has_pooler=self.has_pooler)
            if by_frame:
                vectors = vectors.unflatten(0, (len(batch), -1)).mean(dim=1)
        return np.asarray(vectors.float().cpu().numpy(), dtype=np.float32)


def pooled_output(model: Any, inputs: dict[str, Any], *, kind: str, has_pooler: bool) -> Any:
    """Compute the vectors (b, d) of a batch of inputs, see the start of this file."""
    method = _tower_method(type(model), kind)
    output = getattr(model, method)(**inputs) if method else model(**inputs)
    if method:
        return getattr(output, "pooler_output", output)  # before transformers 5 the output is a tensor
    if has_pooler and getattr(output, "pooler_output", None) is not None:
        return output.pooler_output.flatten(1)
    hidden = output.last_hidden_state
    if kind != "text":
        return hidden.flatten(2).mean(dim=2) if hidden.ndim == 4 else hidden.mean(dim=1)  # feature maps, or tokens
    mask = inputs["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def require_transformers() -> None:
    """Raise ConfigError if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(INSTALL_HINT)


def check_model(name: str, kind: str) -> None:
    """Raise ConfigError if the model does not exist, or does not read this kind of modality."""
    require_transformers()
    config = _load_config(find_model_folder(name, with_weights=False))
    kinds = _readable_kinds(config)
    if kind not in kinds:
        readable = " and ".join(kinds) if kinds else "no kind that mmaudit supports"
        raise ConfigError(f"{name} is a model of type {config.model_type}, which reads {readable}, not {kind}")


def model_version(name: str) -> str:
    """Return the version of a model's vectors: VERSION, the model's commit or digest, and that of transformers."""
    require_transformers()
    import transformers

    content = folder_version(find_model_folder(name, with_weights=True))
    return f"{VERSION} {content} transformers {transformers.__version__.split('.')[0]}"


def open_model(name: str, kind: str, device: str = "cpu") -> Pretrained:
    """Load a model in float32 and eval mode; cached. ConfigError if a file is missing. Thread-safe."""
    with _OPEN_LOCK:
        return _open_model(name, kind, device)


def open_processor(name: str, kind: str) -> InputProcessor:
    """Load what makes a sample the input of a model; cached. ConfigError if a file is missing. Thread-safe."""
    with _OPEN_LOCK:
        return _open_processor(name, kind)


@lru_cache(maxsize=4)
def _open_model(name: str, kind: str, device: str) -> Pretrained:
    processor = _open_processor(name, kind)
    model, has_pooler = load_model(name, kind)
    model = model.to(device).eval().requires_grad_(False)
    return Pretrained(processor=processor, model=model, has_pooler=has_pooler, device=device)


@lru_cache(maxsize=4)
def _open_processor(name: str, kind: str) -> InputProcessor:
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    check_model(name, kind)
    folder = find_model_folder(name, with_weights=True)
    config = _load_config(folder)
    loader: Any = {"audio": AutoFeatureExtractor, "text": AutoTokenizer}.get(kind, AutoImageProcessor)
    with _silence_transformers(), _one_line_errors(name):
        transform = loader.from_pretrained(str(folder), trust_remote_code=False)
    return InputProcessor(
        kind=kind,
        transform=transform,
        num_frames=getattr(config, "num_frames", None) if kind in ("video", "frames") else None,
        max_tokens=_max_tokens(transform, config) if kind == "text" else 0,
    )


def load_model(name: str, kind: str) -> tuple[Any, bool]:
    """Load a new copy of a model in float32 and eval mode, and return with it whether its weights have a pooler.

    Only safetensors are read, and no code of the model's folder is run. ConfigError if it cannot be loaded.
    """
    import torch
    from transformers import AutoModel

    check_model(name, kind)
    folder = find_model_folder(name, with_weights=True)
    with _silence_transformers(), torch.random.fork_rng(devices=[]), _one_line_errors(name):
        torch.manual_seed(0)  # missing weights are initialised at random
        options: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True, "dtype": torch.float32}
        model, loading_info = AutoModel.from_pretrained(str(folder), trust_remote_code=False, **options)
    missing_keys = sorted(loading_info["missing_keys"])
    # Masks are used in pretraining only.
    random_keys = [key for key in missing_keys if "pooler" not in key and "mask" not in key]
    if random_keys:
        log.warning("%s: %d weights (%s, ..) not found, initialised at random", name, len(random_keys), random_keys[0])
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return model, not any("pooler" in key for key in missing_keys)


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Raise what transformers raises for a damaged or incomplete model as ConfigError."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error


def encode_inputs(
    name: str, kind: str, inputs: Iterable[tuple[int, ModelInputs]], *, media: MediaConfig, device: str
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield row and vector of prepared samples, encoded in batches of one shape, so that only texts are padded.

    Padding changes the output of many audio models. The model is opened with the first sample. On the CPU each sample
    is encoded by itself, several in parallel, so that its vector is bit-identical whatever the batch; on CUDA a batch
    is one matrix product, and the last digits may depend on the other samples.
    """
    batches: dict[tuple[tuple[int, ...], ...], list[tuple[int, ModelInputs]]] = {}
    for row, sample in inputs:
        shapes = () if kind == "text" else tuple(value.shape for value in sample.values())
        batch = batches.setdefault(shapes, [])
        batch.append((row, sample))
        model = open_model(name, kind, device)
        if len(batch) >= model.batch_size(media):
            yield from _encode_batch(model, batches.pop(shapes))
    for batch in batches.values():
        yield from _encode_batch(open_model(name, kind, device), batch)


def _encode_batch(
    model: Pretrained, batch: Sequence[tuple[int, ModelInputs]]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    rows, inputs = zip(*batch, strict=True)
    if model.device == "cpu":
        vectors = (vector[0] for vector in parallel_map(lambda sample: model.encode([sample]), inputs))
        return zip(rows, vectors, strict=True)
    return zip(rows, model.encode(inputs), strict=True)


def _readable_kinds(config: Any) -> tuple[str, ...]:
    """Return the kinds of modality that a model reads, by its main input."""
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        return ()
    model: Any = MODEL_MAPPING[type(config)]
    towers = tuple(kind for kind in ("audio", "image", "video", "frames", "text") if _tower_method(model, kind))
    pictures = ("video", "frames") if hasattr(config, "num_frames") else ("image", "video", "frames")
    by_input = {"input_values": ("audio",), "input_features": ("audio",), "input_ids": ("text",)}
    return towers or {**by_input, "pixel_values": pictures}.get(model.main_input_name, ())


def _tower_method(model: type, kind: str) -> str | None:
    """Return the method of a two-tower model that computes the projected features of this kind, else None."""
    name = {"audio": "get_audio_features", "text": "get_text_features"}.get(kind, "get_image_features")
    return name if hasattr(model, "get_text_features") and hasattr(model, name) else None


def _load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        # Without False transformers asks on the terminal whether code in the folder may run.
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: its config.json cannot be read: {str(error).splitlines()[0]}") from error


def _max_tokens(tokenizer: Any, config: Any) -> int:
    """Return the maximum number of tokens; tokenizers without a limit state 10^30."""
    config = getattr(config, "text_config", config)
    return int(min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512)))


def _drop_batch(batch: Any) -> ModelInputs:
    return {name: np.asarray(value[0]) for name, value in batch.items()}


@contextmanager
def _silence_transformers() -> Iterator[None]:
    """Suppress progress bars of transformers and its warnings about weights of unused heads."""
    from transformers.utils import logging

    hf_logging: Any = logging  # it has no type annotations
    level, had_progress_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if had_progress_bar:
            hf_logging.enable_progress_bar()
