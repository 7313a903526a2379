"""The commands under test: preceding commands, options, and files that belong together."""

from __future__ import annotations

from dataclasses import dataclass

Arguments = tuple[str, ...]

_RUN = ("--run", "run")
_DECODE = ("--num-workers", "2", "--set", "data.shard_rows=10")  # of a single shard no worker is started
SCORE_CLIPS: Arguments = ("score", "../data/clips", *_RUN, "--repeats", "1", *_DECODE)
SCORE_FEATURES: Arguments = ("score", "../data/features.parquet", *_RUN, "--repeats", "1")
SCORE_AGAIN: Arguments = (*SCORE_FEATURES, "--seed", "1", "--overwrite")
CHECK_CLIPS: Arguments = ("check", "../data/clips", *_RUN, *_DECODE)
SPLIT: Arguments = ("split", "--balanced", "--overwrite", *_RUN)
SPLIT_WIDE: Arguments = (*SPLIT, "--tolerance", "0.2")
SPLIT_RANDOM: Arguments = ("split", "--subset", "random:50%", "--name", "random", "--overwrite", *_RUN)
FINETUNE: Arguments = (
    *("finetune", "--manifest", "balanced", *_RUN, "--name", "tuned"),
    *("--epochs", "6", "--set", "finetune.save_steps=4"),
)
FINETUNE_OTHER: Arguments = (*FINETUNE, "--seed", "1")
FINETUNE_AGAIN: Arguments = (*FINETUNE, "--overwrite")
REPORT: Arguments = ("report", *_RUN)


def export(manifest: str, form: str) -> Arguments:
    """Return the arguments of an export; the result is printed as JSON, whose form is the same in all versions."""
    return ("export", manifest, *_RUN, "--format", form, "--out", f"exported-{form}", "--json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command, run in a folder where the commands `before` have run.

    `final` is the file that makes the results final. `swaps`: all old results are replaced by all new ones at once.
    `has_workers`: other processes decode for it, and it is struck while they do.
    """

    name: str
    arguments: Arguments
    before: tuple[Arguments, ...] = ()
    final: str | None = None
    swaps: bool = False
    has_workers: bool = False


_TUNED = "run/finetune/tuned/metrics.json"
COMMANDS = (
    Command(name="score", arguments=SCORE_CLIPS, final="run/run.json", has_workers=True),
    Command(
        name="score-overwrite",
        arguments=SCORE_AGAIN,
        before=(SCORE_FEATURES, SPLIT, FINETUNE),
        final="run/run.json",
        swaps=True,
    ),
    Command(name="split", arguments=SPLIT, before=(SCORE_FEATURES,)),
    Command(name="split-replace", arguments=SPLIT, before=(SCORE_FEATURES, SPLIT_WIDE), swaps=True),
    Command(name="finetune", arguments=FINETUNE, before=(SCORE_FEATURES, SPLIT), final=_TUNED),
    Command(
        name="finetune-overwrite",
        arguments=FINETUNE_AGAIN,
        before=(SCORE_FEATURES, SPLIT, FINETUNE_OTHER),
        final=_TUNED,
        swaps=True,
    ),
    Command(
        name="export-webdataset", arguments=export("balanced", "webdataset"), before=(SCORE_CLIPS, SPLIT), swaps=True
    ),
    Command(
        name="export-datasets", arguments=export("balanced", "datasets"), before=(SCORE_FEATURES, SPLIT), swaps=True
    ),
    Command(name="export-csv", arguments=export("balanced", "csv"), before=(SCORE_FEATURES, SPLIT)),
    Command(
        name="export-overwrite",
        arguments=(*export("balanced", "datasets"), "--overwrite"),
        before=(SCORE_FEATURES, SPLIT, SPLIT_RANDOM, export("random", "datasets")),
        swaps=True,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two commands that are started beside each other; in `containers` each is process 1 on the host of that name."""

    name: str
    first: Arguments
    second: Arguments
    before: tuple[Arguments, ...] = ()
    containers: tuple[str, str] | None = None


_SPLIT_BEFORE = (SCORE_FEATURES, SPLIT)
PAIRS = (
    Pair(name="score + score", first=SCORE_CLIPS, second=SCORE_CLIPS),
    Pair(name="check + score", first=CHECK_CLIPS, second=SCORE_CLIPS),
    Pair(name="score + score --overwrite", first=SCORE_FEATURES, second=SCORE_AGAIN),
    Pair(name="split + split", first=SPLIT, second=SPLIT, before=(SCORE_FEATURES,)),
    Pair(name="split + split of other settings", first=SPLIT, second=SPLIT_WIDE, before=(SCORE_FEATURES,)),
    Pair(name="split + score --overwrite", first=SPLIT, second=SCORE_AGAIN, before=(SCORE_FEATURES,)),
    Pair(name="finetune + finetune", first=FINETUNE, second=FINETUNE, before=_SPLIT_BEFORE),
    Pair(name="finetune + score --overwrite", first=FINETUNE, second=SCORE_AGAIN, before=_SPLIT_BEFORE),
    Pair(name="score + finetune", first=SCORE_FEATURES, second=FINETUNE, before=_SPLIT_BEFORE),
    Pair(name="report + split", first=REPORT, second=SPLIT, before=(SCORE_FEATURES,)),
    Pair(
        name="export + export",
        first=export("balanced", "datasets"),
        second=export("balanced", "datasets"),
        before=_SPLIT_BEFORE,
    ),
    Pair(
        name="score + score in two containers",
        first=SCORE_CLIPS,
        second=SCORE_CLIPS,
        containers=("first", "second"),
    ),
    Pair(
        name="split + split in two containers of one host name",
        first=SPLIT,
        second=SPLIT_WIDE,
        before=(SCORE_FEATURES,),
        containers=("same", "same"),
    ),
    Pair(
        name="finetune + finetune in two containers of one host name",
        first=FINETUNE,
        second=FINETUNE,
        before=_SPLIT_BEFORE,
        containers=("same", "same"),
    ),
)
