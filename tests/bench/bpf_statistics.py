"""What the kernel says a process's BPF programs cost: bpf_stats, read from fdinfo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATS = Path("/proc/sys/kernel/bpf_stats_enabled")

# Linux include/uapi/linux/bpf.h, enum bpf_prog_type
UPROBE_PROGRAMS = frozenset({"2"})
KERNEL_FUNCTION_PROGRAMS = frozenset({"2", "26"})


@dataclass(frozen=True)
class RunStatistics:
    """Of some programs: how many there are, how often they ran, and how long, ns."""

    programs: int
    runs: int
    run_ns: int


def run_statistics(pid: int, types: frozenset[str]) -> RunStatistics:
    """Return those of the programs of these types that a process holds, each once."""
    found: dict[str, tuple[int, int]] = {}
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            fields = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        if fields.get("prog_type") in types:
            # a link's fdinfo names its program too, without the numbers
            found[fields["prog_id"]] = max(
                found.get(fields["prog_id"], (0, 0)),
                (int(fields.get("run_cnt", 0)), int(fields.get("run_time_ns", 0))),
            )
    return RunStatistics(len(found), sum(runs for runs, _ in found.values()), sum(ns for _, ns in found.values()))


@contextmanager
def kernel_statistics() -> Iterator[None]:
    """Have the kernel time BPF programs for as long as this lasts."""
    before = STATS.read_text()
    STATS.write_text("1\n")
    try:
        yield
    finally:
        STATS.write_text(before)
