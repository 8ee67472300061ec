"""Power curves: how likely a change that is there is found, and a limit that is kept is verified.

Called by ``check.py --docs``; the chances of ``verify`` are exact, those of ``diff`` simulated.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import numpy as np
from check import diff_power
from matplotlib import pyplot
from scipy import stats
from simulate import PROCESSES

from stallscope.tracer.analysis.compare.rates import upper_count

TRUE_SHARES = (0.0, 0.1, 0.25, 0.5, 0.8)
SCALES = (1.0, 0.8, 0.65, 0.5, 0.35, 0.25)
QUANTITIES = ("total", "p50", "p99", "max")
LENGTHS_S = (15, 60)

_HEAD = """# How often diff and verify are wrong, and how much they see

Written by `make statistics` (tests/statistics/check.py, {runs:,} simulated runs of each verdict and {diffs:,} of each
comparison). What is simulated is in tests/statistics/simulate.py: cron ticks of five calls, ten times a second,
lengths that share their tick's level; drift of that level by 30% within seconds; storms of three ticks 60 times as
long, every 5 to 30 s; stalls one by one and in storms of five.

"By itself" is one comparison at 95%; "as diff marks them" is after Holm's correction for the number of comparisons in
a report, which is what the `~` stands for.

## Errors

"""

_POWER = """## Power

![Power curves](power.svg)

Left: the chance that `verify --max-rate` says verified, exactly, for independent events: by how many events the limit
would let come in the time recorded, and by the true rate as a share of the limit. Without any event 3 are needed at
95%. Events that come in storms of k need up to k times as long; `stallscope plan` says how long from the baseline.

Right: the chance that `diff` finds all lengths shortened, one recording a side, storms and drift as above ({diffs:,}
runs a point). A recording of a side alone is taken to vary by 10%; smaller changes need several recordings a side.

| lengths times | {columns} |
|---|{rule}|
{rows}
"""


def write_power(folder: Path, runs: int, tables: list[str]) -> None:
    """Write power.md and power.svg."""
    mpl.rcParams["svg.hashsalt"] = "stallscope"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    expected = np.geomspace(1, 100, 200)
    for share in TRUE_SHARES:
        left.plot(expected, [verified(mean, share) for mean in expected], label=f"true rate {share:.0%} of the limit")
    left.set(xscale="log", xlabel="events the limit lets come while recording", ylabel="verified", title="verify, 95%")
    diffs = max(runs // 40, 1)
    process = PROCESSES["storms and drift"]
    rows: dict[float, list[str]] = {scale: [] for scale in SCALES}
    for seconds in LENGTHS_S:
        points = [diff_power(process, replace(process, scale=scale), seconds, diffs, seed=seconds) for scale in SCALES]
        for name in QUANTITIES:
            values = [point[name].value for point in points]
            right.plot(SCALES, values, "-" if seconds == 60 else "--", marker=".", label=f"{name}, {seconds} s")
            for scale, value in zip(SCALES, values, strict=True):
                rows[scale].append(f"{value:.0%}")
    right.set(xlabel="lengths afterwards, times", ylabel="found", title="diff, one recording a side")
    right.invert_xaxis()
    for axes in (left, right):
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
        axes.set_ylim(-0.02, 1.02)
    figure.tight_layout()
    figure.savefig(folder / "power.svg", metadata={"Date": None})
    columns = [f"{name}, {seconds} s" for seconds in LENGTHS_S for name in QUANTITIES]
    text = _HEAD.format(runs=runs, diffs=max(runs // 20, 1)) + "\n".join(tables) + "\n"
    text += _POWER.format(
        diffs=diffs,
        columns=" | ".join(columns),
        rule="---|" * len(columns),
        rows="\n".join(f"| {scale} | {' | '.join(cells)} |" for scale, cells in rows.items()),
    ).replace("|---||", "|---|")
    (folder / "power.md").write_text(text, encoding="utf-8")


def verified(mean: float, share: float) -> float:
    """Return the chance that a limit is verified, which lets ``mean`` events come; exact, of independent events."""
    counts = np.arange(0, 400)
    allowed = [count for count in counts if upper_count(count, 0.95) < mean]
    return float(stats.poisson.cdf(allowed[-1], mean * share)) if allowed else 0.0
