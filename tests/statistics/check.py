"""Holds ``diff`` and ``verify`` against simulated truth and prints how often they are wrong.

    python tests/statistics/check.py [--runs 2000] [--docs docs]

Where nothing differs, at most 5% of the comparisons may be significant; where the true rate is at the limit or above,
at most 5% of the verdicts may be "verified". Ends with 1 if more are, by more than the simulation's own chance. With
--docs, writes power.md and power.svg. Takes about 15 minutes for 2,000 runs; tests/unit/test_statistics.py runs fewer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import simulate  # noqa: E402
from simulate import FUNCTION, PROCESSES, STALLS_BY, Process  # noqa: E402

from stallscope.tracer.analysis.compare.changes import Change  # noqa: E402
from stallscope.tracer.analysis.compare.checks import NOT_VERIFIED, VERIFIED, check_limit, check_reduced  # noqa: E402
from stallscope.tracer.analysis.compare.comparison import changes_of, corrected  # noqa: E402
from stallscope.tracer.analysis.compare.limits import STALL, Event, Limit  # noqa: E402
from stallscope.tracer.analysis.compare.sides import STALLS, Side  # noqa: E402

LEVEL = 0.05
RATE_PER_S = 1 / 360
"""Ten stalls an hour: the limit in the simulations of ``verify``."""

EXPECTED = (1, 3, 10, 30)
"""How many events the limit would let come in the time simulated."""


@dataclass(frozen=True)
class Share:
    """How often something happened in simulations."""

    name: str
    hits: int
    runs: int

    @property
    def value(self) -> float:
        """Return the share."""
        return self.hits / self.runs if self.runs else 0.0

    @property
    def is_too_often(self) -> bool:
        """Return whether so many would come less than once in a thousand times if 5% were true."""
        return bool(stats.binom.sf(self.hits - 1, self.runs, LEVEL) < 0.001)


def alone(change: Change) -> bool:
    """Return whether one comparison by itself is significant, without correction for the number of them."""
    return not change.why_not and change.p_value <= LEVEL and change.p_permutation <= LEVEL


def diff_false_alarms(
    process: Process, seconds: float, recordings: int, runs: int, variation: float, seed: int = 1
) -> tuple[Share, Share, Share]:
    """Return how often nothing was called something: by comparison alone, by comparison corrected, by ``diff``."""
    rng = np.random.default_rng(seed)
    single = after_correction = wrong = comparisons = 0
    for _ in range(runs):
        sides = [
            simulate.side([simulate.calls(process, seconds, rng) for _ in range(recordings)], seconds) for _ in range(2)
        ]
        changes = changes_of(sides[0], sides[1], FUNCTION, 0.95, variation)
        made = corrected(changes, LEVEL)
        comparisons += sum(not change.why_not for change in changes)
        single += sum(map(alone, changes))
        after_correction += sum(change.significant for change in made)
        wrong += any(change.significant for change in made)
    return (
        Share("alone", single, comparisons),
        Share("corrected", after_correction, comparisons),
        Share("any", wrong, runs),
    )


def diff_power(before: Process, after: Process, seconds: float, runs: int, seed: int = 2) -> dict[str, Share]:
    """Return how often each quantity's change was found, corrected for the number of comparisons."""
    rng = np.random.default_rng(seed)
    found: dict[str, int] = {}
    for _ in range(runs):
        sides = [simulate.side([simulate.calls(process, seconds, rng)], seconds) for process in (before, after)]
        for change in corrected(changes_of(sides[0], sides[1], FUNCTION, 0.95, 0.1), LEVEL):
            found[change.quantity] = found.get(change.quantity, 0) + change.significant
    return {name: Share(name, hits, runs) for name, hits in found.items()}


def stalls_side(
    make: Callable[[float, float, np.random.Generator], simulate.Floats],
    rate_per_s: float,
    seconds: float,
    rng: np.random.Generator,
) -> Side:
    """Return a side of one recording with stalls."""
    return simulate.side([simulate.stalls(make(rate_per_s, seconds, rng), rng)], seconds)


def verify_shares(
    how: str, true_share: float, expected: float, runs: int, *, with_baseline: bool, seed: int = 3
) -> tuple[Share, Share]:
    """Return how often a rate limit was verified, and how often it was not, by the true rate as a share of it."""
    rng = np.random.default_rng(seed)
    make, seconds = STALLS_BY[how], expected / RATE_PER_S
    limit = Limit(Event(STALL, 10_000_000, "stall"), RATE_PER_S, "stall: 10/h")
    hits = {VERIFIED: 0, NOT_VERIFIED: 0}
    for _ in range(runs):
        baseline = stalls_side(make, 20 * RATE_PER_S, 3600, rng) if with_baseline else None
        verdict = check_limit(limit, stalls_side(make, true_share * RATE_PER_S, seconds, rng), baseline, 0.95).verdict
        if verdict in hits:
            hits[verdict] += 1
    return Share(how, hits[VERIFIED], runs), Share(how, hits[NOT_VERIFIED], runs)


def reduced_shares(how: str, ratio: float, expected: float, runs: int, seed: int = 4) -> Share:
    """Return how often a reduction to a half was verified, by the true ratio of the rates."""
    rng = np.random.default_rng(seed)
    make, seconds = STALLS_BY[how], expected / RATE_PER_S
    event = Event(STALL, 10_000_000, "stall")
    hits = 0
    for _ in range(runs):
        before, after = (stalls_side(make, rate * RATE_PER_S, seconds, rng) for rate in (1.0, ratio))
        hits += check_reduced(event, after, before, 0.95).verdict == VERIFIED
    return Share(how, hits, runs)


def stall_diff_false_alarms(how: str, expected: float, runs: int, seed: int = 5) -> tuple[Share, Share]:
    """Return how often equal rates and lengths of stalls were called different, alone and corrected."""
    rng = np.random.default_rng(seed)
    make, seconds = STALLS_BY[how], expected / RATE_PER_S
    single = after_correction = comparisons = 0
    for _ in range(runs):
        sides = [stalls_side(make, RATE_PER_S, seconds, rng) for _ in range(2)]
        changes = changes_of(sides[0], sides[1], STALLS, 0.95, 0.0)
        comparisons += sum(not change.why_not for change in changes)
        single += sum(map(alone, changes))
        after_correction += sum(change.significant for change in corrected(changes, LEVEL))
    return Share("alone", single, comparisons), Share("corrected", after_correction, comparisons)


class Printer:
    """Prints rows of a table and remembers whether any share was too great."""

    def __init__(self, title: str, *columns: str) -> None:
        self.lines = [f"### {title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        self.is_bad = False

    def row(self, *cells: str | Share) -> None:
        """Add a row; shares that must be at most 5% are marked when they are not."""
        told = []
        for cell in cells:
            if isinstance(cell, Share):
                self.is_bad = self.is_bad or cell.is_too_often
                told.append(f"{cell.value:.1%} of {cell.runs:,}{' TOO OFTEN' if cell.is_too_often else ''}")
            else:
                told.append(cell)
        self.lines.append(f"| {' | '.join(told)} |")
        print(self.lines[-1], flush=True)

    def text(self) -> str:
        """Return the table as Markdown."""
        return "\n".join(self.lines) + "\n"


def coverage(runs: int) -> tuple[list[str], bool]:
    """Return the tables of errors, and whether any is above 5%."""
    tables = []
    verdicts = Printer(
        "verify --max-rate where the true rate is at the limit or above: verified",
        "stalls", "baseline", "events the limit lets come", "at the limit",
    )  # fmt: skip
    for how in STALLS_BY:
        for with_baseline in (True, False):
            if not with_baseline and how != "independent":
                continue
            for expected in EXPECTED:
                share = verify_shares(how, 1.0, expected, runs, with_baseline=with_baseline)[0]
                verdicts.row(how, "an hour" if with_baseline else "none", f"{expected}", share)
    tables.append(verdicts)
    broken = Printer(
        "verify --max-rate where the true rate is at the limit: not verified", "stalls", "events", "not verified"
    )
    for how in STALLS_BY:
        for expected in EXPECTED:
            broken.row(how, f"{expected}", verify_shares(how, 0.99, expected, runs, with_baseline=True, seed=6)[1])
    tables.append(broken)
    halved = Printer(
        "verify --baseline where the rate was just halved, or stayed: verified",
        "stalls", "events in the baseline", "halved", "as before",
    )  # fmt: skip
    for how in STALLS_BY:
        for expected in (10, 30, 100):
            halved.row(how, f"{expected}", *(reduced_shares(how, ratio, expected, runs) for ratio in (0.5, 1.0)))
    tables.append(halved)
    alarms = Printer(
        "diff where nothing differs: comparisons called significant",
        "calls", "recordings", "by itself", "as diff marks them", "any in one diff",
    )  # fmt: skip
    each = max(runs // 20, 1)
    for name, process in PROCESSES.items():
        for seconds in (15, 60):
            alarms.row(
                name, f"1 of {seconds} s a side", *diff_false_alarms(process, seconds, 1, each, 0.1, seed=seconds)
            )
    varied = replace(PROCESSES["storms and drift"], spread=0.15)
    for number, seconds in ((1, 60), (4, 30)):
        alarms.row("storms and drift, 15% from recording to recording", f"{number} of {seconds} s a side",
                   *diff_false_alarms(varied, seconds, number, each, 0.1, seed=number))  # fmt: skip
    tables.append(alarms)
    alike = Printer(
        "diff of stalls where nothing differs", "stalls", "expected a side", "by itself", "as diff marks them"
    )
    for how in STALLS_BY:
        for expected in (10, 30):
            alike.row(how, f"{expected}", *stall_diff_false_alarms(how, expected, max(runs // 20, 1)))
    tables.append(alike)
    return [table.text() for table in tables], any(table.is_bad for table in tables)


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print, and return 1 if anything is wrong too often."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="simulated runs of each kind (default: %(default)s)")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write power.md and power.svg there")
    options = parser.parse_args(arguments)
    tables, is_bad = coverage(options.runs)
    if options.docs is not None:
        from power import write_power

        write_power(options.docs, options.runs, tables)
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
