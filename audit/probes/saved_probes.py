"""Probes as safetensors files: one per modality, and one of the joint probe.

The networks of a modality NAME are files of their own, NAME=REPEAT-FOLD.safetensors, beside NAME.safetensors, which has
their calibration, and in the folder of stages also their outputs for all samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..dataset.labels import Target
from ..errors import RunError
from ..features.matrix import Inputs, JointInputs
from ..storage import atomic_write, link_or_copy
from ..workers import Progress, no_progress
from .config import NetworkConfig
from .crops import PictureView
from .cross_fit import CrossFit
from .design import TermUnits, TorchTarget, Units
from .gaussian import Curve
from .linear import LinearProbe
from .mlp import MlpProbe, Nets
from .network_weights import NetworkInputs, NetworkProbe, score_by_weights
from .probe_set import CalibratedProbe, Calibration, Probe, ProbeSet

_JOINT = "joint"


def save_probes(probe_set: ProbeSet, cross_fit: CrossFit, folder: Path, *, outputs: bool = True) -> None:
    """Write the probes of a set to NAME.safetensors; `cross_fit` holds the folds of the first repeat.

    The files of networks are linked. outputs: whether the outputs of networks for all samples are written too.
    """
    joint = () if probe_set.joint is None else (probe_set.joint,)
    for calibrated in (*probe_set.probes, *joint):
        tensors, stated = _probe_tensors(calibrated.probe)
        if isinstance(calibrated.probe, NetworkProbe):
            tensors = tensors if outputs else {}
            for repeat, files in enumerate(calibrated.probe.weights or ()):
                for fold, file in enumerate(files):
                    link_or_copy(file, weights_file(folder, calibrated.name, repeat, fold))
        first = [cross_fit.fold[int((cross_fit.fold == fold).argmax())] for fold in range(cross_fit.num_folds)]
        scale = calibrated.fold_scale[first]  # of a fold without samples that of another
        tensors["fold_scale"] = torch.from_numpy(np.array(scale, dtype=np.float32))
        if calibrated.anchor is not None:
            tensors["anchor"] = torch.from_numpy(calibrated.anchor)
        stated |= {"name": calibrated.name, "calibration": asdict(calibrated.calibration), "unit": probe_set.min_scale}
        _write(tensors, stated, folder / f"{calibrated.name}.safetensors")


def _write(tensors: Mapping[str, Tensor], stated: Mapping[str, Any], file: Path) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(file) as temporary:
        save_file(contiguous, temporary, metadata={"mmaudit": json.dumps(stated, sort_keys=True)})


def weights_file(folder: Path, name: str, repeat: int, fold: int) -> Path:
    """Return the path of the weights of a network; names of modalities have no equals sign."""
    return folder / f"{name}={repeat}-{fold}.safetensors"


def copy_probes(folder: Path, target: Path, *, networks: Sequence[str]) -> None:
    """Link the probes of a folder into another one, without the outputs of `networks`, modalities by name."""
    for file in sorted(folder.glob("*.safetensors")):
        if file.stem in networks:
            tensors, stated = _read(file, "cpu")
            _write({name: tensors[name] for name in tensors if name not in _OUTPUTS}, stated, target / file.name)
        else:
            link_or_copy(file, target / file.name)


def has_weights(folder: Path, networks: Sequence[str], *, num_folds: Sequence[int]) -> bool:
    """Return whether the weights of all networks are there, of each fold of each repeat of these modalities."""
    return all(
        weights_file(folder, name, repeat, fold).exists()
        for name in networks
        for repeat, number in enumerate(num_folds)
        for fold in range(number)
    )


def num_bytes(probe_set: ProbeSet) -> int:
    """Count the bytes of the tensors that `save_probes` writes, without those of networks."""
    joint = () if probe_set.joint is None else (probe_set.joint,)
    probes = [calibrated.probe for calibrated in (*probe_set.probes, *joint)]
    tensors = [_probe_tensors(probe)[0].values() for probe in probes if not isinstance(probe, NetworkProbe)]
    return sum(tensor.nbytes for values in tensors for tensor in values)


def num_stored_bytes(folder: Path, *, networks: Sequence[str]) -> int:
    """Return the size of the files of probes in a folder, without those of networks, modalities by name."""
    files = [file for file in folder.glob("*.safetensors") if file.stem.partition("=")[0] not in networks]
    return sum(file.stat().st_size for file in files)


def read_calibrations(folder: Path, names: Sequence[str]) -> dict[str, Calibration]:
    """Return the calibration of the probe of each modality, and of `joint` if there is such a probe."""
    files = [*names, *([_JOINT] if (folder / f"{_JOINT}.safetensors").exists() else [])]
    return {name: Calibration(**_read(folder / f"{name}.safetensors", "cpu")[1]["calibration"]) for name in files}


def load_probes(
    folder: Path,
    names: Sequence[str],
    *,
    inputs: Sequence[Inputs],
    present: NDArray[np.bool_],
    target: Target,
    cross_fits: Sequence[CrossFit],
    samples: NDArray[np.integer[Any]],
    device: str,
    networks: Sequence[tuple[PictureView, NetworkConfig] | None] = (),
    progress: Progress = no_progress,
) -> ProbeSet:
    """Read the probes for n samples with these inputs; networks without stored outputs score them by their weights.

    Args:
        folder: Where `save_probes` wrote them.
        names: Names of the modalities.
        inputs: Features of the samples in each modality.
        present: Which modalities each sample has (n, m).
        target: Target of the samples.
        cross_fits: Folds of the samples in each repeat.
        samples: The samples among those that the probes were fitted for (n,): networks have stored outputs of them.
        device: Device of the probes.
        networks: View and settings of each modality with a network, None of others; by default there are none.
        progress: Callback for the progress of networks.
    """
    calibrated = []
    files = [*names, *([_JOINT] if (folder / f"{_JOINT}.safetensors").exists() else [])]
    unit = 0.0
    for index, name in enumerate(files):
        tensors, stated = _read(folder / f"{name}.safetensors", device)
        is_joint = name == _JOINT
        own_inputs = JointInputs(parts=tuple(inputs)) if is_joint else inputs[index]
        own_present = reduce(np.logical_or, present.T) if is_joint else np.ascontiguousarray(present[:, index])
        fold, anchor = cross_fits[0].fold, tensors.get("anchor")
        unit = float(stated["unit"])
        if stated["kind"] == "network" and not tensors.keys() >= {*_OUTPUTS}:
            network = networks[index] if index < len(networks) else None
            probe: Probe = _score_by_weights(
                folder, name, network, own_inputs, cross_fits, target.num_outputs, device=device, progress=progress
            )
        else:
            probe = _probe_of(tensors, stated, own_inputs, cross_fits, samples)
        calibrated.append(
            CalibratedProbe(
                name=name,
                inputs=own_inputs,
                present=own_present,
                probe=probe,
                fold_scale=tensors["fold_scale"].cpu().numpy(),
                fold=fold,
                calibration=Calibration(**stated["calibration"]),
                anchor=None if anchor is None else anchor.cpu().numpy(),
            )
        )
    joint = calibrated.pop() if files[-1] == _JOINT and len(files) > len(names) else None
    return ProbeSet(probes=tuple(calibrated), joint=joint, target=target, unit=unit)


_OUTPUTS = ("by_repeat", "by_epoch")


def _score_by_weights(
    folder: Path,
    name: str,
    network: tuple[PictureView, NetworkConfig] | None,
    inputs: Inputs,
    cross_fits: Sequence[CrossFit],
    num_outputs: int,
    *,
    device: str,
    progress: Progress,
) -> NetworkProbe:
    if network is None:
        raise RunError(f"{folder}: the probe of {name} is a network, but its modality has none")
    files = tuple(
        tuple(weights_file(folder, name, repeat, fold) for fold in range(cross_fit.num_folds))
        for repeat, cross_fit in enumerate(cross_fits)
    )
    rows = NetworkInputs(rows=inputs, view=network[0], config=network[1], device=device)
    return score_by_weights(rows, cross_fits, files, num_outputs=num_outputs, progress=progress)


def _read(file: Path, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt", device=device) as opened:
            stated = json.loads(opened.metadata()["mmaudit"])
            # Copies: tensors of the file start at any byte, and products with one output then differ in the last digit.
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}, stated  # noqa: SIM118  # no mapping
    except Exception as cause:  # safetensors raises an error of its own, which is an Exception
        raise RunError(f"{file} cannot be read ({cause}): run the stage fit again") from cause


def _probe_tensors(probe: Probe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a probe, and its plain values."""
    if isinstance(probe, NetworkProbe):
        return {name: torch.from_numpy(getattr(probe, name)) for name in _OUTPUTS}, {"kind": "network"}
    if isinstance(probe, MlpProbe):
        states = {"nets": probe.nets, **{f"snapshot.{index}": nets for index, nets in enumerate(probe.snapshots)}}
        tensors = {f"{name}.{layer}": getattr(nets, layer) for name, nets in states.items() for layer in _LAYERS}
        units = probe.torch_target
        plain = {"task": units.task, "num_outputs": units.num_outputs, "centre": units.centre, "scale": units.scale}
        return {**tensors, **_unit_tensors(probe.units)}, {"kind": "mlp", "target": plain}
    assert isinstance(probe, LinearProbe)
    tensors = {"theta": probe.theta, "l2": probe.l2, **_unit_tensors(probe.units)}
    tensors |= {f"snapshot.{index}": theta for index, theta in enumerate(probe.snapshots)}
    if probe.term_units is not None:
        tensors |= {"terms": torch.from_numpy(probe.term_units.terms), "gain": torch.from_numpy(probe.term_units.gain)}
    for index, curve in enumerate(probe.curves):
        if curve is not None:
            tensors |= {f"curve.{index}.{name}": getattr(curve, name) for name in _CURVE}
    factors = [None if curve is None else curve.factor for curve in probe.curves]
    return tensors, {"kind": "linear", "num_steps": probe.num_steps, "factors": factors}


_LAYERS, _CURVE, _UNITS = ("first", "second"), ("axes", "roots", "offset", "constant"), ("centre", "scale", "spread")


def _unit_tensors(units: Units) -> dict[str, Tensor]:
    return {f"units.{name}": getattr(units, name) for name in _UNITS}


def _probe_of(
    tensors: Mapping[str, Tensor],
    stated: Mapping[str, Any],
    inputs: Inputs,
    cross_fits: Sequence[CrossFit],
    samples: NDArray[np.integer[Any]],
) -> Probe:
    if stated["kind"] == "network":
        outputs = (tensors[name].cpu().numpy()[:, samples] for name in _OUTPUTS)
        by_repeat, by_epoch = outputs
        return NetworkProbe(by_repeat=by_repeat, by_epoch=by_epoch)
    units = Units(**{name: tensors[f"units.{name}"] for name in _UNITS})
    if stated["kind"] == "mlp":
        names = ["nets", *(f"snapshot.{index}" for index in range(_num_snapshots(tensors)))]
        nets, *snapshots = (Nets(**{layer: tensors[f"{name}.{layer}"] for layer in _LAYERS}) for name in names)
        target = TorchTarget(values=torch.empty(0), **stated["target"])
        return MlpProbe(
            inputs=inputs,
            cross_fits=tuple(cross_fits),
            units=units,
            torch_target=target,
            nets=nets,
            snapshots=tuple(snapshots),
        )
    curves = [
        None if factor is None else Curve(**{name: tensors[f"curve.{index}.{name}"] for name in _CURVE}, factor=factor)
        for index, factor in enumerate(stated["factors"])
    ]
    term_units = None
    if "terms" in tensors:
        term_units = TermUnits(terms=tensors["terms"].cpu().numpy(), gain=tensors["gain"].cpu().numpy())
    return LinearProbe(
        inputs=inputs,
        cross_fits=tuple(cross_fits),
        units=units,
        term_units=term_units,
        theta=tensors["theta"],
        curves=tuple(curves),
        l2=tensors["l2"],
        num_steps=stated["num_steps"],
        snapshots=tuple(tensors[f"snapshot.{index}"] for index in range(_num_snapshots(tensors))),
    )


def _num_snapshots(tensors: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith("snapshot.")})
