"""Tests of the figures: drawn from numbers only, the same bytes for any user settings, any label drawable."""

from __future__ import annotations

import io
import logging
import re
from itertools import combinations, pairwise
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from mmaudit.audit.figure_style import COLOURS, INK, canvas
from mmaudit.audit.scores.mixture import MixtureConfig, fit_mixture
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.cli.report.drawing import DPI, WIDTH, palette, png, text_colour
from mmaudit.cli.report.figures import build_figures, coloured_names, draw
from mmaudit.cli.report.findings import class_numbers, discrepancies, gaps, maps, training
from mmaudit.cli.report.outcome_figures import draw_finetune, draw_manifest

pytestmark = pytest.mark.usefixtures("drawn_figures")


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


def finetune_of(branches: tuple[str, ...]) -> dict[str, Any]:
    """Return the numbers of a fine-tuning with these branches, tested on subsets that the first two dominate."""
    metrics = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}
    names = ("all", "in-manifest", *(f"{name}-dominated-{share}" for name in branches[:2] for share in ("0.2", "0.4")))
    return {
        "name": "one",
        "branches": [*branches, "fused"],
        "subsets": [{"name": name, "n": 12_345, "branches": [metrics] * (len(branches) + 1)} for name in names],
        "task": "classification",
        "metric": "accuracy",
        "metric_name": "accuracy",
        "chance": {"uniform": 0.25, "majority": 0.3},
        "best_epoch": 2,
        "history": {"epoch": [1, 2], "train_loss": [2.0, 1.0], "validation_loss": [2.0, None]},
    }


def boxes_of(figure: Figure) -> dict[Text, Any]:
    """Return the box of every text that is drawn, in pixels."""
    figure.set_dpi(100)
    surface: Any = FigureCanvasAgg(figure)
    surface.draw()
    renderer = surface.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    texts = [text for text in texts if text.axes is None or text.axes.get_visible()]
    boxes = {text: text.get_window_extent(renderer) for text in texts}
    axes_shown = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    shown = {label for axis in axes_shown for label in shown_ticks(axis)}
    hidden = {label for axis in axes_shown for label in axis.get_ticklabels(which="both")} - shown
    return {text: box for text, box in boxes.items() if text not in hidden}


def shown_ticks(axis: Any) -> list[Text]:
    """Return the labels of the ticks within the limits of an axis."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [tick.label1 if tick.label1.get_visible() else tick.label2 for tick in ticks]


def all_figures(names: tuple[str, ...], labels: tuple[str, ...]) -> dict[str, Figure]:
    """Return every figure of a report with these modalities and classes."""
    numbers = numbers_of(uniform(len(names)), names=names, labels=labels)
    between = f"{names[0]}:{names[1]}"
    return {
        **build_figures(numbers),
        "manifest": draw_manifest(manifest_of([4.0] * 10, between=between, sizes=(10, 40, 90)), palette(names)),
        "finetune": draw_finetune(finetune_of(names), palette(names)),
    }


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


@pytest.mark.parametrize("num_modalities", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_figures_are_small_and_no_text_is_cut_off_at_the_edge(num_modalities: int) -> None:
    numbers = numbers_of(uniform(num_modalities), names=tuple(f"spectrogram of {j}" for j in range(num_modalities)))
    for name, image in draw(numbers).items():
        assert len(image) < 200_000, name
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


LONG = "a_very_long_modality_name_that_somebody_took_from_a_file_{:02d}"
SENTENCE = "playing the instrument number {} in a crowded room full of people"


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        pytest.param(("audio", "visual"), tuple(f"c{index}" for index in range(200)), marks=pytest.mark.slow),
        pytest.param(
            tuple(LONG.format(index) for index in range(2)),
            tuple(SENTENCE.format(index) for index in range(30)),
            marks=pytest.mark.slow,
        ),
        (tuple(LONG.format(index) for index in range(3)), ("W" * 80, "a", "b")),
        pytest.param(tuple(LONG.format(index) for index in range(6)), ("$x^2$", "100%", "<b>"), marks=pytest.mark.slow),
        (("_hidden", "$x_1$", "100%s"), ("__", "a_{b}^c", "\\frac{1}")),
    ],
)
def test_texts_lie_within_the_canvas_and_do_not_overlap(names: tuple[str, ...], labels: tuple[str, ...]) -> None:
    with canvas():
        for title, figure in all_figures(names, labels).items():
            boxes = boxes_of(figure)
            width, height = figure.bbox.width, figure.bbox.height
            for text, box in boxes.items():
                assert box.x0 >= -1, (title, text.get_text())
                assert box.x1 <= width + 1, (title, text.get_text())
                assert box.y0 >= -1, (title, text.get_text())
                assert box.y1 <= height + 1, (title, text.get_text())
            for (first, box), (second, other) in combinations(boxes.items(), 2):
                overlap_x = min(box.x1, other.x1) - max(box.x0, other.x0)
                overlap_y = min(box.y1, other.y1) - max(box.y0, other.y0)
                assert min(overlap_x, overlap_y) < 2, (title, first.get_text(), second.get_text())


def test_legends_name_every_branch_and_both_levels_of_guessing() -> None:
    with canvas():
        figure = draw_finetune(finetune_of(("_hidden", "$x$", "audio")), palette(("_hidden", "$x$", "audio")))
        legends = [legend for legend in figure.findobj(Legend) if isinstance(legend, Legend)]
        names = [text.get_text().strip() for legend in legends for text in legend.get_texts()]
    assert {"_hidden", "$x$", "audio", "fused", "uniform 0.250", "majority 0.300"} <= set(names)


@pytest.mark.parametrize(
    ("task", "metric", "measured", "chance"),
    [
        ("multilabel", "map", {"map": 0.6}, {"constant": 0.2}),
        ("regression", "mae", {"mae": 12.5, "mae_low": 11.0, "mae_high": 14.0}, {"median": 20.0, "mean": 21.0}),
        ("multilabel", "map", {"map": None}, {"constant": 0.0}),
    ],
)
def test_metric_of_the_task_is_drawn(
    task: str, metric: str, measured: dict[str, float | None], chance: dict[str, float]
) -> None:
    finetune = finetune_of(("audio", "visual")) | {"task": task, "metric": metric, "metric_name": metric.upper()}
    finetune |= {"chance": chance, "subsets": [{"name": "all", "n": 9, "branches": [measured] * 3}]}
    with canvas():
        figure = draw_finetune(finetune, palette(("audio", "visual")))
        boxes_of(figure)
        names = {text.get_text().strip() for legend in figure.findobj(Legend) for text in legend.get_texts()}
    axes = figure.axes[0]
    assert axes.get_xlabel() == f"{metric.upper()} on test samples"
    assert {f"{name} {level:.3f}" for name, level in chance.items()} <= names
    low, high = axes.get_xlim()
    assert low == 0
    assert high == 1 if task == "multilabel" else high > 20


def test_losses_of_a_single_epoch_are_drawn_at_a_whole_number() -> None:
    numbers = finetune_of(("audio", "visual"))
    numbers |= {"best_epoch": 1, "history": {"epoch": [1], "train_loss": [2.0], "validation_loss": [1.5]}}
    with canvas():
        figure = draw_finetune(numbers, palette(("audio", "visual")))
        shown = [label.get_text() for label in shown_ticks(figure.axes[1].xaxis) if label in boxes_of(figure)]
    assert shown == ["0", "1", "2"]
    assert {line.get_marker() for line in figure.axes[1].lines if line.get_label() != "kept"} == {"o"}


def test_training_maps_end_where_the_samples_end() -> None:
    numbers = numbers_of(uniform(3), names=("a", "b", "c"))
    for modality in numbers["training"]:
        cells = np.array(modality["counts"])
        cells[:, 8:] = 0  # no standard deviation above 0.08
        modality["counts"] = cells.tolist()
    with canvas():
        figure = build_figures(numbers)["training"]
    for axes in figure.axes:
        assert axes.get_xlim() == pytest.approx((0, 0.15))


@pytest.mark.parametrize("num_modalities", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_every_name_in_a_figure_belongs_to_one_modality(num_modalities: int) -> None:
    """Names that differ in their middle only were cut alike on the two sides of a histogram, and between maps."""
    names = tuple(f"log_mel_spectrogram_of_microphone_{letter * 4}_at_16_kHz" for letter in "abcd"[:num_modalities])
    with canvas():
        figures = build_figures(numbers_of(uniform(num_modalities), names=names))
        figures["manifest"] = draw_manifest(manifest_of([5] * 10, between=":".join(names[:2])), palette(names))
        for title, figure in figures.items():
            texts = {text.get_text() for text in figure.findobj(Text) if "…" in text.get_text()}
            assert all(re.search("([abcd])\\1|[abcd]_at_16", text) for text in texts), (title, texts)
            sides = [text for text in texts if "←" in text or "→" in text]
            assert len({text.strip("←→ ") for text in sides}) == len(sides), (title, sides)


@pytest.mark.parametrize(
    "num_modalities", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(6, marks=pytest.mark.slow)]
)
def test_ticks_of_neighbouring_panels_are_apart(num_modalities: int) -> None:
    names = tuple("abcdef"[:num_modalities])
    with canvas():
        figures = build_figures(numbers_of(uniform(num_modalities), names=names))
        for title in ("training", "discrepancy", "maps"):
            boxes = boxes_of(figures[title])
            shown = [axes for axes in figures[title].axes if axes.get_visible()]
            ticks = [[boxes[tick] for tick in shown_ticks(axes.xaxis) if tick in boxes] for axes in shown]
            for first, second in pairwise(ticks):
                if first and second and second[0].x0 > first[0].x0:
                    assert second[0].x0 - first[-1].x1 >= 10, title


def test_branches_of_other_data_have_colours_of_their_own() -> None:
    numbers = numbers_of(uniform(2), names=("audio", "visual"))
    numbers["finetunes"] = [finetune_of(("audio", "text", "touch"))]
    assert coloured_names(numbers) == ["audio", "visual", "text", "touch"]
    with canvas():
        legend = build_figures(numbers)["finetune-one"].legends[0]
        shades = [handle.get_color() for handle in legend.findobj(Line2D) if handle.get_marker() == "o"]
    assert {to_hex(shade) for shade in shades} == {COLOURS[0], COLOURS[2], COLOURS[3], INK}


def test_text_colours_have_the_contrast_of_text() -> None:
    for colour in COLOURS:
        rgb = np.array([int(text_colour(colour)[start : start + 2], 16) for start in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05) >= 4.5


@pytest.fixture
def only_dejavu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has the fonts of matplotlib and no others."""
    monkeypatch.setattr("mmaudit.audit.figure_style._installed", lambda: ["DejaVu Sans", "STIXGeneral"])


@pytest.mark.usefixtures("only_dejavu")
def test_scripts_that_no_font_covers_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    labels = ("数字", "日本語のクラス", "ไทย", "🎉\ufe0f", "Ελληνικά")
    with caplog.at_level(logging.WARNING, logger="mmaudit"):
        draw(numbers_of(uniform(2), names=("audio", "visual"), labels=labels))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "CJK (" in message
    assert "Thai (3 characters)" in message
    assert "symbols and emoji (1 character)" in message
    assert "Noto Sans CJK" in message
    assert "fonts-noto-cjk" in message
    assert "Greek" not in message
