"""Made numbers of a study, for tests of its claims, page and figures."""

from __future__ import annotations

from typing import Any

from mmaudit.audit.agreement import Agreement


def row(method: str, difference: float, **changes: Any) -> dict[str, Any]:
    """Make a row of a summary: an interval of 4 points, significant above 2."""
    significant = abs(difference) > 0.02
    verdict = "no evidence" if not significant else "helps" if difference > 0 else "hurts"
    made = {
        "manifest": "all",
        "method": method,
        "reference_manifest": "all",
        "reference": "joint",
        "kind": "method",
        "subset": "all",
        "accuracy": 0.7 + difference,
        "reference_accuracy": 0.7,
        "difference": difference,
        "low": difference - 0.02,
        "high": difference + 0.02,
        "p": 0.01 if significant else 0.4,
        "p_holm": 0.02 if significant else 0.8,
        "smallest_effect": 0.03,
        "num_samples": 300,
        "num_seeds": 5,
        "verdict": verdict,
    }
    return made | changes


def control(method: str, difference: float, **changes: Any) -> dict[str, Any]:
    """Make a row of a control."""
    return row(method, difference, kind="control", **changes)


def comparison(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Make the numbers of a comparison with these rows."""
    accuracies = {f"{entry['manifest']}/{entry['method']}": [entry["accuracy"], 0.01] for entry in rows}
    made = {
        "name": "methods",
        "baseline": "joint",
        "summary": list(rows),
        "warnings": [],
        "findings": [],
        "selection": None,
        "pairs": [],
        "epochs": 30,
        "num_trainings": 5 * (len(rows) + 1),
        "accuracies": {"all/joint": [0.7, 0.01], **accuracies},
    }
    return made | changes


def agreement(value: float | None) -> dict[str, Any]:
    """Make an agreement with an interval of 0.1 on both sides."""
    bounds = (None, None) if value is None else (value - 0.1, value + 0.1)
    return Agreement(value=value, low=bounds[0], high=bounds[1], num_samples=300).to_dict()


def dataset(methods: dict[str, Any], subsets: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Make the numbers of a dataset."""
    measure: dict[str, Any] = {"measure": "discrepancy", "between": "audio:image", "rank": agreement(0.6)}
    measure |= {"ceiling_features": 0.7, "ceiling_folds": 0.95}
    side = {"between": "audio:image", "threshold": 0, "kappa": agreement(0.5)}
    probe: dict[str, Any] = {"name": "mlp", "kind": "probe", "accuracy": {"audio": 0.6, "image": 0.7}}
    made = {
        "num_samples": 1500,
        "num_test": 300,
        "num_classes": 10,
        "num_groups": 6,
        "modalities": ["audio", "image"],
        "between": "audio:image",
        "accuracy": {"audio": 0.61, "image": 0.72},
        "reliability": [{"modality": "audio", "r": 0.6, "z": 20.0}],
        "lean": {"mean": -0.1, "low": -0.2, "high": 0.0},
        "histogram": [75] * 20,
        "truth_text": "",
        "manifests": {"all": {"train": 1200}, "balanced": {"train": 200}},
        "methods": methods,
        "subsets": subsets or comparison(),
        "shuffled": [{"method": "joint", "accuracy": 0.7, "lowest": 0.69, "shuffled": 0.1, "above": True}],
        "probes": [probe | {"measures": [measure, measure | {"measure": "gap"}], "sides": [side, side]}],
        "networks": [
            {
                "method": "joint",
                "rank": agreement(0.4),
                "kappa": agreement(0.3),
                "between_seeds": 0.8,
                "ceiling": 0.9,
                "num_seeds": 5,
            }
        ],
        "truth": None,
    }
    return made | changes


def study(**sets: dict[str, Any]) -> dict[str, Any]:
    """Make the numbers of a study of these datasets."""
    return {"seeds": 5, "baseline": "joint", "sets": sets}
