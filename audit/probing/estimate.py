"""Estimates of how long a fit takes, from a timed part of one of its steps."""

from __future__ import annotations

import logging
import time

import torch

from .aim import Aim
from .crossing import Lesson
from .design import Design
from .glm import evaluate_rows

log = logging.getLogger("mmaudit")

_TYPICAL_STEPS = 10  # of the fits measured; a hard one takes some hundreds
_MAX_SECONDS = 60.0  # a fit whose typical number of steps takes longer is announced
_MIN_LOGITS = 1 << 26  # rows x probes x outputs; below, ten steps take a few seconds, and nothing is measured
_TIMED_LOGITS = 1 << 23  # some hundredths of a second, unless a few rows have more
_MIN_TIMED_ROWS = 128


def log_estimate(design: Design, answer: Aim, lesson: Lesson, *, max_steps: int) -> None:
    """Log how long a step takes and how many there may be, with the settings that bound it, if it may be long."""
    num_rows, num_probes = len(lesson.rows), int(lesson.learn.shape[1])
    if num_rows * num_probes * answer.num_outputs < _MIN_LOGITS:
        return
    seconds = step_seconds(design, answer, lesson)
    steps = min(_TYPICAL_STEPS, max_steps)
    if seconds * steps > _MAX_SECONDS:
        log.info(
            "a fit of %d probes to %d rows, %d outputs and %d features: %.1f s a step, %d steps %s, at most %d steps "
            "%s; bounded by --set probe.max_steps=N, less with --repeats 1, --set probe.folds=2, "
            "--set probe.most_rows=N, --set probe.joint=false or --set probe.control=false",
            num_probes,
            num_rows,
            answer.num_outputs,
            design.rows.shape[1],
            seconds,
            steps,
            _duration(steps * seconds),
            max_steps,
            _duration(max_steps * seconds),
        )


def step_seconds(design: Design, answer: Aim, lesson: Lesson) -> float:
    """Return the seconds that loss and gradient of all probes take, from the faster of two runs over a few rows."""
    num_rows, num_probes = len(lesson.rows), int(lesson.learn.shape[1])
    few = min(num_rows, max(_MIN_TIMED_ROWS, _TIMED_LOGITS // (num_probes * answer.num_outputs)))
    learn = torch.from_numpy(lesson.learn).to(design.rows.device)
    theta = design.curvature.new_full((num_probes, design.rows.shape[1] + 1, answer.num_outputs), 1e-3)
    seconds = list[float]()
    for _ in range(2):
        start = time.perf_counter()
        evaluate_rows(design, answer.found, task=answer.task, learn=learn, theta=theta, num_rows=few)
        seconds.append(time.perf_counter() - start)
    return min(seconds) * (num_rows / few)


def _duration(seconds: float) -> str:
    """Return a duration in words: `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"
