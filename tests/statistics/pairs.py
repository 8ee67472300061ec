"""Records the real servers of the lab and compares them: the verdicts that are known beforehand must come out.

    python tests/statistics/pairs.py [--folder DIR] [--seconds 60] [--tries 20]

Needs root and the builds 2.8.17, 2.8.17-patched and 5.0.6 (vagrant/lab/build.py). Prints a Markdown table; takes about
15 minutes with the lengths above. Recordings that are in the folder already are used again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "vagrant")]

from lab.incident import prepared_load  # noqa: E402
from lab.recipes import RECIPES  # noqa: E402
from lab.server import Server, running_server  # noqa: E402
from storms import storms  # noqa: E402

STALLSCOPE = [str(Path(sys.executable).with_name("stallscope"))]
BUILDS = ("2.8.17", "2.8.17-patched", "5.0.6")
SMALL = replace(RECIPES["small-buffers"], small_buffers=6_000, rate_per_s=100, duration_s=40.0)
TRY_S = 12


def record(server: Server, path: Path, seconds: float) -> Path:
    """Record a server; a recording that is there already stays."""
    words = ["record", "-p", str(server.pid), "-d", f"{seconds:g}s", "-q", "-o", str(path), "--force"]
    subprocess.run([*STALLSCOPE, *words], check=True, stderr=subprocess.DEVNULL)
    return path


def record_storms(folder: Path, build: str, seconds: float, number: int = 0) -> Path:
    """Record a server of the lab under storms of large buffers."""
    path = folder / f"storms-{build}-{number}.stall"
    if not path.exists():
        with ExitStack() as stack:
            server = stack.enter_context(running_server(build))
            stack.enter_context(storms(server.port, uploaders=60, idle=2_500, connections_per_s=50))
            record(server, path, seconds)
    return path


def record_small_buffers(folder: Path, build: str) -> Path:
    """Record a server of the lab with many small buffers."""
    path = folder / f"small-{build}.stall"
    if not path.exists():
        with running_server(build) as server, prepared_load(server, SMALL) as load:
            load.start()
            record(server, path, SMALL.duration_s - 6)
            load.outcome()
    return path


def record_same(folder: Path, tries: int) -> list[Path]:
    """Record one and the same server again and again under a light load."""
    paths = [folder / f"same-{number}.stall" for number in range(tries + 1)]
    if not all(path.exists() for path in paths):
        with ExitStack() as stack:
            server = stack.enter_context(running_server("2.8.17"))
            stack.enter_context(storms(server.port, uploaders=0, idle=300, connections_per_s=50))
            for path in paths:
                record(server, path, TRY_S)
    return paths


def asked(*words: object) -> tuple[int, Any]:
    """Return the exit code and the document of a command with --json."""
    done = subprocess.run([*STALLSCOPE, *map(str, words), "--json"], capture_output=True, text=True)
    if not done.stdout:
        raise SystemExit(done.stderr)
    return done.returncode, json.loads(done.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, compare, print, and return 1 if anything came out otherwise than expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / ".cache" / "pairs")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each recording under storms")
    parser.add_argument("--tries", type=int, default=20, help="pairs of recordings of the same server")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard < 20_000 else 20_000, hard))
    same = record_same(options.folder, options.tries)
    large = {build: record_storms(options.folder, build, options.seconds) for build in BUILDS}
    again = record_storms(options.folder, "2.8.17", options.seconds, 1)
    small = {build: record_small_buffers(options.folder, build) for build in BUILDS[:2]}
    return report(same, large, again, small)


@dataclass(frozen=True)
class Row:
    """One comparison: what was asked, what must come out, and what did."""

    what: str
    expected: str
    found: str
    said: str

    @property
    def is_right(self) -> bool:
        """Return whether it came out as expected."""
        return self.expected == self.found


def verdict(what: str, expected: str, after: Path, before: Path, *limits: str) -> Row:
    """Return what verify says."""
    status, document = asked("verify", after, "--baseline", before, *limits)
    found = {0: "verified", 1: "not verified", 3: "inconclusive"}.get(status, f"exit {status}")
    return Row(what, expected, found, str(document["paragraph"]))


def changed(what: str, expected: str, before: Path, after: Path, subject: str, quantity: str) -> Row:
    """Return whether diff finds a quantity less, more or unchanged."""
    _, document = asked("diff", before, after)
    (change,) = (one for one in document["changes"] if (one["subject"], one["quantity"]) == (subject, quantity))
    found = "unchanged" if not change["significant"] else "less" if change["ratio"] < 1 else "more"
    values = [change["before"]["value"], change["after"]["value"]]
    bounds = [change["low"], change["high"]]
    said = f"{subject} {quantity}: {values[0]:.3g} -> {values[1]:.3g} {change['unit']}, ratio {bounds}"
    return Row(what, expected, found, said)


def alarms(paths: Sequence[Path]) -> list[Row]:
    """Return a row for each pair of recordings of the same server."""
    rows = []
    for before, after in pairwise(paths):
        _, document = asked("diff", before, after)
        found = [f"{one['subject']} {one['quantity']}" for one in document["changes"] if one["significant"]]
        rows.append(
            Row(f"{before.name} and {after.name}", "no alarm", ", ".join(found) or "no alarm", document["headline"])
        )
    return rows


def report(same: Sequence[Path], large: dict[str, Path], again: Path, small: dict[str, Path]) -> int:
    """Print what came out, and return 1 if anything did otherwise than expected."""
    old, patched, new = (large[build] for build in BUILDS)
    slow = ("--max", "clientsCron<200ms")
    rows = [
        verdict("large buffers: 2.8.17 to 5.0.6, no slow clientsCron", "verified", new, old, *slow),
        verdict("large buffers: 2.8.17 to 2.8.17-patched, no slow clientsCron", "not verified", patched, old, *slow),
        verdict("large buffers: 2.8.17 twice, no slow clientsCron", "not verified", again, old, *slow),
        changed("large buffers: 2.8.17 to 5.0.6", "less", old, new, "clientsCron", "total"),
        changed("large buffers: 2.8.17 to 2.8.17-patched", "unchanged", old, patched, "clientsCron", "total"),
        changed("large buffers: 2.8.17 twice", "unchanged", old, again, "clientsCron", "total"),
        changed("small buffers: 2.8.17 to 2.8.17-patched", "less", *small.values(), "clientsCron", "total"),
        changed("small buffers: the trims", "less", *small.values(), "sdsRemoveFreeSpace", "calls"),
    ]
    tries = alarms(same)
    print("| comparison | expected | found | it says |", "|---|---|---|---|", sep="\n")
    for row in [*rows, *(row for row in tries if not row.is_right)]:
        print(f"| {row.what} | {row.expected} | {row.found}{'' if row.is_right else ' WRONG'} | {row.said} |")
    wrong = sum(not row.is_right for row in tries)
    print(f"\nThe same server twice: {wrong} of {len(tries)} pairs with a false alarm.")
    return int(wrong > 0 or not all(row.is_right for row in rows))


if __name__ == "__main__":
    sys.exit(main())
