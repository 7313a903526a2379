"""Tests of the figures: drawn from numbers only, the same bytes for any user settings, any label drawable."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mmaudit.audit.scores.mixture import MixtureConfig, fit_mixture
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.cli.report.figures import COLOURS, DPI, INK, WIDTH, canvas, draw, draw_manifest, palette, png
from mmaudit.cli.report.findings import class_numbers, discrepancies, gaps, maps, training


def numbers_of(
    confidence: np.ndarray[Any, Any], *, names: tuple[str, ...], labels: tuple[str, ...] = ("a", "b", "c")
) -> dict[str, Any]:
    """Return the part of report.json that figures are drawn from."""
    n = len(confidence)
    codes = (np.arange(n) % len(labels)).astype(np.int32)
    scores = ScoreTable(
        sample_id=np.array([f"s{row}" for row in range(n)], dtype=object),
        label=codes,
        label_name=np.array(labels, dtype=object)[codes],
        modalities=names,
        confidence=confidence.astype(np.float32),
        training_confidence=confidence.astype(np.float32),
        training_variability=(confidence / 2).astype(np.float32),
    )
    mixture = fit_mixture(scores.gap, config=MixtureConfig(), seed=0)
    return {
        "facts": {"modalities": [{"name": name} for name in names]},
        "discrepancy": discrepancies(scores),
        "classes": class_numbers(scores),
        "gap": gaps(scores, mixture, class_check="not tested: a drawing"),
        "training": training(scores),
        "maps": maps(scores),
        "manifests": [],
        "finetunes": [],
        "max_detailed": 8,
    }


def manifest_of(after: list[float], *, between: str = "audio:visual", sizes: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return the numbers of a manifest of 90 samples over 10 bins; with sizes, it was made uniform."""
    target = {"grid": False, "weighted": False}
    curve = [{"tolerance": step / 10, "distance": step / 10, "size": size} for step, size in enumerate(sizes)]
    balance = {
        "target": target if sizes else None,
        "edges": np.linspace(-1, 1, 11).tolist(),
        "before": [9] * 10,
        "after": after,
        "distance_after": 0.1,
        "effective_size": sum(after),
        "curve": curve,
    }
    return {"name": "one", "between": between, "kept": round(sum(after)), "balance": balance}


def draw_pixels(manifest: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return the pixels of a manifest's figure."""
    with canvas():
        return pixels(png(draw_manifest(manifest, palette(("audio", "visual")))))


def uniform(m: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).random((90, m))


def pixels(image: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def share_of(colour: str, image: np.ndarray[Any, Any]) -> float:
    """Return the share of pixels that nearly have this colour."""
    rgb = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)])
    return float((np.abs(image.astype(int) - rgb).max(axis=2) < 12).mean())


def test_png_has_no_metadata_and_white_background() -> None:
    figures = draw(numbers_of(uniform(2), names=("audio", "visual")))
    assert set(figures) == {"discrepancy", "classes", "gap", "maps", "training"}
    for content in figures.values():
        image = Image.open(io.BytesIO(content))
        assert image.format == "PNG"
        assert image.info.keys() <= {"transparency"}
        assert len(content) < 100_000
        assert tuple(pixels(content)[0, 0]) == (255, 255, 255)
    assert Image.open(io.BytesIO(figures["gap"])).width == round(WIDTH * DPI)


def test_figures_ignore_user_matplotlib_settings() -> None:
    numbers = numbers_of(uniform(2), names=("audio", "visual"))
    once = draw(numbers)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert draw(numbers) == once
        assert matplotlib.rcParams["font.size"] == 30  # the user's settings are unchanged


def test_bars_have_the_colour_of_their_side() -> None:
    positive = draw(numbers_of(np.tile([0.9, 0.1], (90, 1)), names=("audio", "visual")))["discrepancy"]
    negative = draw(numbers_of(np.tile([0.1, 0.9], (90, 1)), names=("audio", "visual")))["discrepancy"]
    first, second = COLOURS[:2]
    half = pixels(positive).shape[1] // 2
    assert share_of(first, pixels(positive)[:, half:]) > 5 * share_of(second, pixels(positive)[:, half:])
    assert share_of(second, pixels(negative)[:, :half]) > 5 * share_of(first, pixels(negative)[:, :half])


def test_any_label_can_be_drawn() -> None:
    labels = ("$\\frac{$", "<b>", "\n\t\x00", "数字", "x" * 500, "مرحبا")
    assert draw(numbers_of(uniform(2), names=("audio", "$\\frac{$"), labels=labels))["classes"]


def test_figures_of_ten_modalities_are_small() -> None:
    figures = draw(numbers_of(uniform(10), names=tuple(f"m{index}" for index in range(10))))
    assert all(len(content) < 200_000 for content in figures.values())


@pytest.mark.parametrize("num_modalities", [2, 3, 4, 10])
def test_no_text_is_cut_off_at_the_edge(num_modalities: int) -> None:
    numbers = numbers_of(uniform(num_modalities), names=tuple(f"spectrogram of {j}" for j in range(num_modalities)))
    for name, image in draw(numbers).items():
        drawn = pixels(image)
        edges = np.concatenate([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]])
        assert (edges == 255).all(), name


def test_palette_is_stable() -> None:
    names = [f"m{index}" for index in range(10)]
    colours = palette(names)
    assert len({colours[name] for name in names[:8]}) == 8
    assert colours["m8"] == colours["m0"]
    assert colours["fused"] == INK
    assert palette(names[:2]) == {name: colours[name] for name in ("m0", "m1", "fused")}


def test_manifest_bars_have_the_colour_of_their_side() -> None:
    first, second = COLOURS[:2]
    positive, negative = ([0.0] * 5 + [9.0] * 5, [9.0] * 5 + [0.0] * 5)
    assert share_of(first, draw_pixels(manifest_of(positive))) > 0.1
    assert share_of(second, draw_pixels(manifest_of(positive))) == 0
    assert share_of(second, draw_pixels(manifest_of(negative))) > 0.1
    assert share_of(second, draw_pixels(manifest_of(negative, between="audio"))) == 0  # "the others" has no colour


def test_only_uniform_manifests_have_a_curve() -> None:
    subset, balanced = (draw_pixels(manifest_of([4.0] * 10, sizes=sizes)) for sizes in ((), (10, 40, 90)))
    first = COLOURS[0]
    wide, narrow = (share_of(first, image) for image in (subset, balanced))
    assert narrow < 0.8 * wide  # the curve takes the space next to it
    assert share_of(first, balanced[:, -balanced.shape[1] // 4 :]) == 0


def test_any_manifest_can_be_drawn() -> None:
    assert draw_pixels(manifest_of([0.0] * 10)).any()
    assert draw_pixels(manifest_of([4.0] * 10, between="<b>$\\frac{$:" + "x" * 200, sizes=(0, 2, 3_000_000))).any()
