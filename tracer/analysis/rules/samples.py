"""Rules about sampled stacks: culprits that nobody named, and stalls that were not on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.findings import CAUSE, CONTRIBUTES, Evidence
from stallscope.tracer.analysis.rules.rule import KEPT_EVIDENCE, Found, Rule, refused, since_start
from stallscope.tracer.analysis.sample_rows import ASLEEP, BLOCKED, RUNNABLE, STATES
from stallscope.tracer.analysis.samples import PASSES_ON, Culprit, plain_name
from stallscope.tracer.units import format_count, format_duration_ns

KEPT_CULPRITS = 3
WORTH_TELLING = 0.1
"""Off-CPU time is told from this share of the stalls on."""

SHOWN_CALLERS = 6

_REASONS = (
    ("swap", re.compile(r"do_swap_page|swap_read|swapin")),
    ("page faults", re.compile(r"asm_exc_page_fault|exc_page_fault|handle_mm_fault|do_user_addr_fault")),
    ("writing to disk", re.compile(r"\w*f(data)?sync|jbd2|\w*writepages|balance_dirty_pages|\w*_sys_p?write")),
    ("disk", re.compile(r"io_schedule|submit_bio|\w*_file_read|filemap|\w*_sys_p?read|folio_wait|blk_")),
    ("a lock", re.compile(r"futex|rwsem|mutex|percpu_down|\w*_sys_flock|fcntl_setlk|\w*mmap_lock")),
    ("a child process", re.compile(r"\w*_sys_wait4|\w*_sys_waitid|kernel_clone|copy_process")),
    ("the network", re.compile(r"sk_wait|tcp_|inet_|unix_|sock_|\w*_sys_connect|do_poll|do_select|ep_poll")),
    ("nothing but time (sleep)", re.compile(r"\w*nanosleep|hrtimer_nanosleep|do_nanosleep")),
)
"""What a thread waits for, by the kernel's functions on its stack; the first that fits."""

_REMEDIES = {
    "swap": "keep Redis out of swap: less maxmemory, more memory, or vm.swappiness = 0 for its cgroup",
    "page faults": "look for memory given back and touched again: allocator purges, transparent huge pages, fork",
    "writing to disk": "keep fsync off the main thread: appendfsync everysec, no-appendfsync-on-rewrite yes",
    "disk": "find what is read on the main thread: its callers are in the flame graph",
    "a lock": "find who holds it: the callers are in the flame graph",
}
_LOOK = "see the callers in the flame graph of the stall"


def untraced_culprits(analysis: Analysis) -> Iterator[Found]:
    """Functions in which stalls were spent and that were not traced, the one with most time first."""
    by_function: dict[str, list[Culprit]] = {}
    for culprit in analysis.samples.culprits:
        by_function.setdefault(culprit.function, []).append(culprit)
    lost = analysis.blame.by_stall(len(analysis.stalls.frame))
    ranked = sorted(by_function.items(), key=lambda item: -sum(culprit.weight_ns for culprit in item[1]))
    for function, mine in ranked[:KEPT_CULPRITS]:
        weight_ns, total_ns = (sum(getattr(culprit, name) for culprit in mine) for name in ("weight_ns", "total_ns"))
        count = int(sum(lost[culprit.stall] for culprit in mine))
        which = "the stall" if len(mine) == 1 else f"{format_count(len(mine), 'stall')}"
        title = f"{weight_ns / max(total_ns, 1):.0%} of {which} in {function}, not probed"
        worst = sorted(mine, key=lambda culprit: -culprit.weight_ns)[:KEPT_EVIDENCE]
        yield Found(
            CAUSE if count else CONTRIBUTES,
            title + (f"; meanwhile {refused(count)}" if count else ""),
            tuple(_culprit(analysis, culprit) for culprit in worst),
            {"function": function},
        )


def asleep(analysis: Analysis) -> Iterator[Found]:
    """Stalls that were spent asleep, by what for."""
    weights = analysis.samples.in_stalls()
    mine = weights.loc[weights["state"].isin([STATES.index(ASLEEP), STATES.index(BLOCKED)])]
    total_ns = int(weights["weight_ns"].sum())
    if not total_ns or mine["weight_ns"].sum() < WORTH_TELLING * total_ns:
        return
    where = mine["stack"].map({int(stack): _place(analysis, int(stack)) for stack in mine["stack"].unique()})
    sums = mine.groupby(where)["weight_ns"].sum().sort_values(ascending=False, kind="stable")
    reason = str(sums.index[0]).partition("|")[0]
    facts = []
    for place, weight_ns in sums.head(KEPT_EVIDENCE).items():
        what, _, path = str(place).partition("|")
        facts.append(
            Evidence(f"{format_duration_ns(int(weight_ns))} waiting for {what}: {path or 'callers not known'}")
        )
    slept_ns = int(mine["weight_ns"].sum())
    yield Found(
        CONTRIBUTES,
        f"{slept_ns / total_ns:.0%} of the stalls' time asleep ({format_duration_ns(slept_ns)}), most of it waiting "
        f"for {reason}",
        tuple(facts),
        {"remedy": _REMEDIES.get(reason, _LOOK)},
    )


def want_cpu(analysis: Analysis) -> Iterator[Found]:
    """Stalls in which the thread could have run and had no CPU."""
    weights = analysis.samples.in_stalls()
    mine = weights.loc[weights["state"] == STATES.index(RUNNABLE)]
    total_ns, waited_ns = int(weights["weight_ns"].sum()), int(mine["weight_ns"].sum())
    if not total_ns or waited_ns < WORTH_TELLING * total_ns:
        return
    by_stall = mine.groupby("stall")["weight_ns"].sum().sort_values(ascending=False, kind="stable")
    yield Found(
        CONTRIBUTES,
        f"{waited_ns / total_ns:.0%} of the stalls' time ({format_duration_ns(waited_ns)}) Redis could run, but had no "
        "CPU",
        tuple(
            _waited(analysis, int(str(stall)), int(waited)) for stall, waited in by_stall.head(KEPT_EVIDENCE).items()
        ),
    )


def _culprit(analysis: Analysis, culprit: Culprit) -> Evidence:
    start_ns, length_ns = _span(analysis, culprit.stall)
    callers = culprit.path[: culprit.path.index(culprit.function) + 3] if culprit.function in culprit.path else ()
    shown = " > ".join(("...", *callers[-SHOWN_CALLERS:]) if len(callers) > SHOWN_CALLERS else callers)
    share = f"{culprit.weight_ns / max(culprit.total_ns, 1):.0%}"
    return Evidence(
        f"a stall of {format_duration_ns(length_ns)}, {share} of its samples in {shown}",
        since_start(analysis, start_ns),
        length_ns,
    )


def _waited(analysis: Analysis, stall: int, waited_ns: int) -> Evidence:
    start_ns, length_ns = _span(analysis, stall)
    return Evidence(
        f"a stall of {format_duration_ns(length_ns)}, {format_duration_ns(waited_ns)} of it waiting for a CPU",
        since_start(analysis, start_ns),
        length_ns,
    )


def _span(analysis: Analysis, stall: int) -> tuple[int, int]:
    row = analysis.stalls.frame.iloc[stall]
    return int(row["start_ns"]), int(row["duration_ns"])


def _place(analysis: Analysis, stack: int) -> str:
    """Return what a sleeping thread waits for, and the server's functions that lead there, with a bar between."""
    frames = analysis.samples.functions_of(stack)
    kernel = [frame.name for frame in frames if frame.is_kernel]
    reason = next((what for what, names in _REASONS if any(names.match(name) for name in kernel)), "")
    user = [plain_name(frame.name) for frame in frames if not frame.is_kernel]
    path = [name for name in user if name not in PASSES_ON]
    return f"{reason or (kernel[0] if kernel else 'something')}|{' > '.join(path[-SHOWN_CALLERS:])}"


RULES = (
    Rule("untraced-culprits", "add --probe {function}", untraced_culprits),
    Rule("stalls-asleep", "{remedy}", asleep),
    Rule("stalls-want-cpu", "give Redis a CPU of its own: look at what else runs there, at cpu.max of its cgroup, and "
         "at the machine's steal time", want_cpu),
)  # fmt: skip
