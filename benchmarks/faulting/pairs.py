"""Two writers at once: what they leave must be what they leave one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from zlib import crc32

import numpy as np

from .cases import Cases
from .checks import Damage, last_line, names_holder
from .commands import Arguments, Pair
from .processes import Outcome, Running, run
from .trees import Snapshot, differing, half_files, leftovers, snapshot

Outcomes = tuple[Outcome, Outcome]
Result = tuple[tuple[int, int], Snapshot]  # exit codes of both commands, and the folder after them
_PAUSE_SECONDS = 10.0  # for which the first command waits at least for the second, which may wait for it
_PAUSE_SHARE = 3.0  # ... and of the usual duration of the second
_START_SECONDS = 60.0


def draw_operations(cases: Cases, pair: Pair, count: int, *, seed: int) -> list[int]:
    """Draw before which file operation of the first command the second begins and ends; 0: both start at once."""
    cases.begin(cases.stage(pair.before))
    run(cases.bench, pair.first)
    num_operations = len(cases.bench.operations())
    cases.end()
    rng = np.random.default_rng([seed, crc32(pair.name.encode())])
    drawn = rng.permutation(num_operations)[: count - 1] + 1
    return [0, *sorted(int(operation) for operation in drawn)]


def run_pair(cases: Cases, pair: Pair, operation: int) -> tuple[Damage, bool]:
    """Run both commands; return what is wrong, and whether one was refused since the other held the folder.

    The first waits before `operation` until the second has ended, or waits itself.
    """
    usual_seconds = cases.seconds((*pair.before, pair.second))
    cases.begin(cases.stage(pair.before))
    hosts, go = pair.containers or ("", ""), cases.bench.scratch / "go"
    pause = {"FAULT_OPERATION": str(operation), "FAULT_GO": str(go)} if operation else {}
    cases.bench.log.unlink(missing_ok=True)
    first = Running(cases.bench, pair.first, prefix=_container(hosts[0]), variables={**cases.bench.hook(), **pause})
    _wait(lambda: len(cases.bench.operations()) >= operation or first.has_ended(), _START_SECONDS)
    second = Running(cases.bench, pair.second, prefix=_container(hosts[1]))
    _wait(lambda: operation == 0 or second.has_ended(), max(_PAUSE_SECONDS, _PAUSE_SHARE * usual_seconds))
    go.touch()
    outcomes = (first.finish(), second.finish())
    go.unlink()
    tree = snapshot(cases.bench.case)
    damage = Damage()
    for outcome in outcomes:
        damage.add("orphans", *outcome.orphans)
    references = _serial_results(cases, pair, outcomes)
    damage.add("half files", *half_files(cases.bench.case, references=[reference for _, reference in references]))
    refused = any(names_holder(outcome) for outcome in outcomes)
    cases.end()
    _compare(outcomes, tree, references, damage)
    return damage, refused


def _serial_results(cases: Cases, pair: Pair, outcomes: Outcomes) -> list[Result]:
    """Return what both orders give, and what one command alone gives where the other was refused."""
    aside = cases.bench.case.with_name("paired")
    cases.bench.case.rename(aside)
    before = pair.before
    codes = cases.codes((*before, pair.first, pair.second))
    results = [((codes[-2], codes[-1]), snapshot(cases.stage((*before, pair.first, pair.second))))]
    codes = cases.codes((*before, pair.second, pair.first))
    results.append(((codes[-1], codes[-2]), snapshot(cases.stage((*before, pair.second, pair.first)))))
    if names_holder(outcomes[1]):
        results.append(((cases.codes((*before, pair.first))[-1], 2), snapshot(cases.stage((*before, pair.first)))))
    if names_holder(outcomes[0]):
        results.append(((2, cases.codes((*before, pair.second))[-1]), snapshot(cases.stage((*before, pair.second)))))
    aside.rename(cases.bench.case)
    return results


def _compare(outcomes: Outcomes, tree: Snapshot, results: list[Result], damage: Damage) -> None:
    codes = (outcomes[0].code, outcomes[1].code)
    possible = [reference for expected, reference in results if expected == codes]
    if not possible:
        ends = " and ".join(f"{outcome.code} ({last_line(outcome)})" for outcome in outcomes)
        damage.add("wrong exits", f"exit codes {ends}, which no order of the two gives")
        possible = [reference for _, reference in results]
    nearest = min(possible, key=lambda reference: len(differing(tree, reference)))
    damage.add("bytes differing", *differing(tree, nearest))
    damage.add("left over", *leftovers(tree, nearest))


def _wait(is_over: Callable[[], bool], max_seconds: float) -> None:
    deadline = time.monotonic() + max_seconds
    while not is_over() and time.monotonic() < deadline:
        time.sleep(0.02)


def _container(host: str) -> Arguments:
    """Return what starts a command as process 1 of a process namespace, on a host of this name; nothing for none."""
    if not host:
        return ()
    script = 'hostname "$0" && exec "$@"'
    return ("unshare", "--pid", "--fork", "--mount-proc", "--uts", "--kill-child", "sh", "-c", script, host)
