"""Outputs of network probes: stored ones, and those that saved weights give other rows.

The weights of each fold of each repeat are a safetensors file: those that score its rows, `final`, and in the first
repeat those after each recorded epoch, `epoch 0` and so on; without `final` the last of these are the final ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, RunError
from ..features.matrix import Inputs, RowIndex
from ..storage import atomic_write
from ..workers import NETWORK_THREADS, Progress, fixed_threads, no_progress, prefetch_map
from .config import NetworkConfig
from .crops import PictureView
from .cross_fit import CrossFit
from .network import READERS, Network, batch_slices, build_network, check_view

FINAL = "final"
WeightFiles = tuple[tuple[Path, ...], ...]  # of each fold of each repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkProbe:
    """Stored out-of-fold outputs of n rows: of each repeat (r, n, k), and of the first by epoch (e, n, k).

    weights: Files of the networks; None if they were not kept.
    """

    by_repeat: NDArray[np.float32]
    by_epoch: NDArray[np.float32]
    weights: WeightFiles | None = None

    def logits(self, rows: RowIndex, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Return the outputs of these rows in each repeat: (r, b, k). Other `inputs` raise ConfigError."""
        if inputs is not None:
            raise ConfigError(
                "a network probe cannot score masked inputs, as it only stores outputs: set probe.joint = false"
            )
        return self.by_repeat[:, rows]

    def logits_by_epoch(self, rows: RowIndex) -> NDArray[np.float32]:
        """Return the outputs of these rows after the recorded epochs: (e, b, k)."""
        return self.by_epoch[:, rows]

    def take(self, samples: RowIndex, inputs: Inputs) -> NetworkProbe:
        """Return the outputs of a part of the samples (b,)."""
        return NetworkProbe(by_repeat=self.by_repeat[:, samples], by_epoch=self.by_epoch[:, samples])


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkInputs:
    """Inputs of networks, how they are viewed as pictures, and the settings and the device of the networks."""

    rows: Inputs
    view: PictureView
    config: NetworkConfig
    device: str

    @property
    def device_type(self) -> str:
        """The type of the device: "cuda" or "cpu"."""
        return torch.device(self.device).type

    def batches(
        self, rows: Sequence[RowIndex], *, draw: Callable[[Tensor, RowIndex], Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows and their pictures on the device, batch by batch, while threads read ahead.

        draw: Returns the pictures of stored values on the device, of these rows; None: whole pictures.
        """
        on_cuda = self.device_type == "cuda"

        def read(batch: RowIndex) -> tuple[RowIndex, Tensor, Tensor]:
            values = torch.from_numpy(np.require(self.rows.read(batch), requirements=("C", "W")))
            on_host = torch.from_numpy(batch)
            return (batch, on_host.pin_memory(), values.pin_memory()) if on_cuda else (batch, on_host, values)

        for batch, index, values in prefetch_map(read, rows, num_threads=READERS):
            on_device = values.to(self.device, non_blocking=True)
            pictures = self.view.whole(on_device) if draw is None else draw(on_device, batch)
            yield index.to(self.device, non_blocking=True), pictures

    def autocast(self) -> torch.autocast:
        """Return the autocast context: bfloat16 if configured, or with "auto" on CUDA."""
        default = "bfloat16" if self.device_type == "cuda" else "float32"
        precision = default if self.config.precision == "auto" else self.config.precision
        return torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=precision == "bfloat16")

    def build(self, *, num_outputs: int, seed: int) -> Network:
        """Build a network with random weights, on the CPU."""
        return build_network(self.view.shape, num_outputs=num_outputs, width=self.config.width, seed=seed)

    def to_device(self, network: Network) -> Network:
        """Move a network to the device, with the memory layout of its pictures."""
        any_network: Any = network  # torch's type stubs lack the memory_format of Module.to
        on_device: Network = any_network.to(self.device, memory_format=network.trunk.memory_format)
        return on_device

    @torch.no_grad()
    def predict(self, network: Network, rows: RowIndex) -> Tensor:
        """Compute a network's outputs (b, k) for these rows in eval mode."""
        network.eval()
        outputs = [torch.zeros(0, network.head.out_features, device=self.device)]
        for _, pictures in self.batches(batch_slices(rows, self.config.batch_size)):
            with self.autocast():
                outputs.append(network(pictures))
        return torch.cat(outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Weights of a network by moment of its training, see the module, and the units of its outputs."""

    states: Mapping[str, Mapping[str, Tensor]]
    centre: float
    scale: float

    def write(self, file: Path) -> None:
        """Write the weights as a safetensors file."""
        tensors = {
            f"{moment}/{name}": value.detach().cpu().contiguous()
            for moment, state in self.states.items()
            for name, value in state.items()
        }
        stated = json.dumps({"centre": self.centre, "scale": self.scale}, sort_keys=True)
        with atomic_write(file) as temporary:
            save_file(tensors, temporary, metadata={"mmaudit": stated})


def state_of(network: Network) -> dict[str, Tensor]:
    """Return a copy of the weights of a network, on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in network.state_dict().items()}


def epoch_name(index: int) -> str:
    """Return the name of the weights after a recorded epoch."""
    return f"epoch {index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """A file of the weights of one network, whose names, shapes and types are those of `network`."""

    file: Path
    network: Network
    num_epochs: int  # recorded ones; 0 after the first repeat

    def outputs(self, inputs: NetworkInputs, rows: RowIndex) -> NDArray[np.float32]:
        """Return the outputs (1 + e, b, k) of rows: final ones, and after each recorded epoch.

        Raises:
            RunError: The file is damaged, or of another network.
        """
        moments = [epoch_name(index) for index in range(self.num_epochs)]
        with self._open() as opened:
            stated = json.loads(opened.metadata()["mmaudit"])
            centre, scale = float(stated["centre"]), float(stated["scale"])
            names = set(opened.keys())
            has_final = not moments or any(name.startswith(f"{FINAL}/") for name in names)
            moments = [FINAL, *moments] if has_final else moments
            self._check(opened, names, moments)
        by_moment = []
        for moment in moments:
            with self._open() as opened:
                self.network.load_state_dict(
                    {name: opened.get_tensor(f"{moment}/{name}") for name in self.network.state_dict()}
                )
            outputs = inputs.predict(self.network, rows) * scale + centre
            by_moment.append(np.asarray(outputs.cpu().numpy(), dtype=np.float32))
        return np.stack(by_moment if has_final else [by_moment[-1], *by_moment])

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.file, framework="pt") as opened:
                yield opened
        except RunError:
            raise
        except Exception as cause:  # safetensors raises an error of its own, which is an Exception
            raise RunError(f"{self.file} cannot be read ({cause}): score the data again with --overwrite") from cause

    def _check(self, opened: Any, names: set[str], moments: Sequence[str]) -> None:
        """Raise RunError unless the file has exactly the tensors of these moments, each of the network's shape."""
        state = self.network.state_dict()
        expected = {f"{moment}/{name}": value for moment in moments for name, value in state.items()}
        for name in sorted(names ^ expected.keys()):
            raise RunError(f"{self.file} is of another network: {name} is {'added' if name in names else 'missing'}")
        for name, value in expected.items():
            tensor = opened.get_slice(name)
            if (tensor.get_shape(), tensor.get_dtype()) != (list(value.shape), _TYPES[value.dtype]):
                raise RunError(
                    f"{self.file} is of another network: {name} is {tensor.get_dtype()} {tensor.get_shape()}, not "
                    f"{_TYPES[value.dtype]} {list(value.shape)}"
                )


_TYPES = {torch.float32: "F32", torch.int64: "I64"}


@fixed_threads(NETWORK_THREADS)
def score_by_weights(
    inputs: NetworkInputs,
    cross_fits: Sequence[CrossFit],
    files: WeightFiles,
    *,
    num_outputs: int,
    progress: Progress = no_progress,
) -> NetworkProbe:
    """Score n rows in each repeat by the network of their fold.

    Rows of a fold are read in the order of the keys of the cross-fit, as when the network was fitted, so that the rows
    that it was fitted with have the same outputs bit by bit on the same device; in batches of other rows the last
    digits of float32 differ.
    """
    check_view(inputs.view, inputs.rows.num_features)
    network = inputs.to_device(inputs.build(num_outputs=num_outputs, seed=0))
    by_repeat = np.zeros((len(cross_fits), inputs.rows.num_rows, num_outputs), np.float32)
    by_epoch = np.zeros((len(inputs.config.recorded_epochs), *by_repeat.shape[1:]), np.float32)
    done, total = 0, sum(map(len, files))
    for repeat, (cross_fit, of_folds) in enumerate(zip(cross_fits, files, strict=True)):
        order = np.argsort(cross_fit.key, kind="stable")
        for fold, file in enumerate(of_folds):
            rows = order[cross_fit.fold[order] == fold]
            if len(rows):
                num_epochs = len(by_epoch) if repeat == 0 else 0
                outputs = WeightFile(file=file, network=network, num_epochs=num_epochs).outputs(inputs, rows)
                by_repeat[repeat, rows] = outputs[0]
                by_epoch[:num_epochs, rows] = outputs[1:]
            done += 1
            progress("networks", done, total)
    return NetworkProbe(by_repeat=by_repeat, by_epoch=by_epoch)
