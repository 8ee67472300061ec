"""What each overflow was caused by: every one is given exactly one cause.

The tests, in this order; *short* is two stall thresholds and two sampling intervals:

stall
    It fell into a stall, or the queue had not been normal again since the stall ended
    (:mod:`stalls`) and no more time had passed since then than the stall had lasted. What is still refused
    later than that belongs to the stall unless the accepts show slow drain. Needs event loop iterations, or
    calls in their place. Where overflows are sampled, one whose interval touches a stall counts as inside.

The other tests look at an *episode*: from when the queue was last seen normal (at most a tenth of its limit),
or from the end of the last stall's drain if that is later, to the last overflow before it is normal again.
They need that no stall can have been missed: where event loop iterations were not observed or were lost, or
the recording was cut short in the middle of the episode, and where the queue was not sampled, there is no
known cause. Otherwise no iteration in the episode reached the stall threshold, so the server came back to
its queue at least that often, and the first of these that holds is the cause:

backlog too small
    The episode began with a normal queue and is short: a server that came back within one threshold found
    the queue full already. A burst came that the queue could not hold until the next iteration.
slow drain
    The episode is longer, and the server accepted throughout it (never paused for longer than short), but
    fewer than came: accepted, waiting and refused together. So it takes too few connections an iteration.
    Redis 7.4 and later accept ten, unless ``max-new-connections-per-cycle`` says otherwise.
no known cause
    Everything else: the server accepted nothing, or paused, with no long iteration recorded (a process that
    was stopped, or not scheduled, while it waited for events). So are overflows of no watched listener.

The reason why there is no known cause is kept with each.

On the sampled rung overflows are known by interval and listener (:mod:`overflows`), the queue every sampling
interval; with kernel probes each overflow has its own time. Accepts and iterations are known one by one on
both. One that was refused again and again counts each time, as the kernel counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.chance import Coincidence, Series, compare_with_chance
from stallscope.tracer.analysis.overflows import NOT_ATTRIBUTABLE, listener_step
from stallscope.tracer.analysis.segments import range_max, sum_by
from stallscope.tracer.analysis.stall_queues import STALE_NS, normal_length
from stallscope.tracer.analysis.stalls import DRAIN, ITERATIONS, OUTSIDE, Stalls
from stallscope.tracer.analysis.tables import Ints, Tables
from stallscope.tracer.manifest import ITERATION, ListenerInfo

STALL, SLOW_DRAIN, SMALL_BACKLOG, NO_KNOWN_CAUSE = "stall", "slow drain", "backlog too small", "no known cause"
CAUSES = (STALL, SLOW_DRAIN, SMALL_BACKLOG, NO_KNOWN_CAUSE)

UNWATCHED = "at no listener that was watched"
LOOP_UNSEEN = "the event loop was not observed, so a stall cannot be excluded"
LOOP_LOST = "event loop iterations were lost, so a stall cannot be excluded"
CUT_SHORT = "the recording was cut short, a stall in progress is not in it"
QUEUE_UNSEEN = "the accept queue was not sampled then"
NOT_ACCEPTING = "the server did not accept for long, though no long iteration was recorded: stopped or not scheduled"
FAST_ENOUGH = "the server accepted as fast as connections came"

NO_EPISODE = -1


@dataclass(frozen=True)
class Blame:
    """Every overflow with its cause.

    Attributes:
        overflows: ``Stalls.overflows`` with ``cause`` (one of ``CAUSES``), ``reason`` (why it has no known
            cause, else "") and ``episode`` (int64, row of ``episodes``, -1: none).
        episodes: one row per episode of overflows that no stall is known to have caused, sorted by listener
            and start:

            ================= ===== ===== ==============================================================
            listener, pid     int64       where
            start_ns          int64 ns    since when the queue was not normal
            end_ns            int64 ns    the last overflow
            overflows         int64       refused in it
            accepted          int64       accepted by the process in it
            came              int64       accepted, refused, and by how much the queue grew
            pause_ns          int64 ns    the longest time in it without an accept
            queue_limit       int64       limit of the queue
            from_normal       bool        it began with a normal queue
            stall             int64       the stall whose drain it is the late part of, -1: none
            cause, reason     str         as above
            ================= ===== ===== ==============================================================

        coincidence: how overflows fall into stalls, against chance; of those at watched listeners, and of
            the stalls themselves, not their drains. None without stalls or overflows.
    """

    overflows: pd.DataFrame
    episodes: pd.DataFrame
    coincidence: Coincidence | None

    def counts(self) -> dict[str, int]:
        """Return how many overflows have each cause, in the order of ``CAUSES``."""
        total = self.overflows.groupby("cause")["count"].sum()
        return {cause: int(total.get(cause, 0)) for cause in CAUSES}

    def by_stall(self, stalls: int) -> Ints:
        """Return how many overflows each of so many stalls caused; shape (stalls,)."""
        mine = self.overflows.loc[(self.overflows["cause"] == STALL).to_numpy()]
        return sum_by(mine["stall"].to_numpy(), mine["count"].to_numpy(), stalls)


@dataclass(frozen=True)
class BlameSummary:
    """How many overflows have which cause.

    Attributes:
        causes: by cause, all of ``CAUSES``; reasons: why those without a known cause have none, by reason.
        coincidence: how overflows fall into stalls, against chance.
    """

    causes: dict[str, int]
    reasons: dict[str, int]
    coincidence: Coincidence | None


def summarise_blame(blame: Blame) -> BlameSummary:
    """Return the overflows by cause."""
    unknown = blame.overflows.loc[blame.overflows["cause"] == NO_KNOWN_CAUSE]
    reasons = unknown.groupby("reason")["count"].sum().sort_values(ascending=False)
    return BlameSummary(
        blame.counts(), {str(reason): int(number) for reason, number in reasons.items()}, blame.coincidence
    )


def assign_blame(tables: Tables, stalls: Stalls) -> Blame:
    """Return every overflow with its cause; the tests are in this module's documentation."""
    overflows = stalls.overflows
    count = len(overflows)
    cause, reason = np.full(count, STALL, dtype=object), np.full(count, "", dtype=object)
    unwatched = (overflows["listener"] == NOT_ATTRIBUTABLE).to_numpy()
    cause[unwatched], reason[unwatched] = NO_KNOWN_CAUSE, UNWATCHED
    late = _late_in_drain(overflows, stalls.frame)
    open_rows = np.flatnonzero(~unwatched & (late | (overflows["phase"] == OUTSIDE).to_numpy()))
    parts: list[pd.DataFrame] = []
    members = []
    found = 0
    for listener in tables.manifest.listeners:
        mine = open_rows[(overflows["listener"] == listener.index).to_numpy()[open_rows]]
        if len(mine):
            rows = overflows.iloc[mine].assign(late=late[mine])
            number, episodes = _episodes(tables, stalls, listener, rows)
            members.append((mine, number + found))
            parts.append(episodes)
            found += len(episodes)
    episode = np.full(count, NO_EPISODE, np.int64)
    episodes = pd.concat(parts, ignore_index=True) if parts else _no_episodes()
    episodes = _with_cause(episodes, tables, stalls)
    for mine, number in members:
        episode[mine] = number
        cause[mine] = episodes["cause"].to_numpy()[number]
        reason[mine] = episodes["reason"].to_numpy()[number]
    assigned = overflows.assign(cause=cause, reason=reason, episode=episode)
    return Blame(assigned, episodes, _coincidence(tables, stalls))


def _late_in_drain(overflows: pd.DataFrame, frame: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Return which overflows of a drain came later after the stall than it had lasted."""
    late = np.zeros(len(overflows), np.bool_)
    rows = np.flatnonzero((overflows["phase"] == DRAIN).to_numpy())
    stall = frame.iloc[overflows["stall"].to_numpy()[rows]]
    patience = (stall["start_ns"] + 2 * stall["duration_ns"]).to_numpy()
    late[rows] = overflows["after_ns"].to_numpy()[rows] >= patience
    return late


def _episodes(tables: Tables, stalls: Stalls, listener: ListenerInfo, rows: pd.DataFrame) -> tuple[Ints, pd.DataFrame]:
    """Return to which episode each overflow of one listener belongs, and the episodes."""
    after, seen = rows["after_ns"].to_numpy(), rows["seen_ns"].to_numpy()
    length = listener_step(tables, listener.index, "queue_length")
    limit = listener_step(tables, listener.index, "queue_limit")
    start, last_normal = _last_normal(tables, listener, after)
    calm_ns = _last_calm(stalls.frame, listener.pid, after)
    start = np.maximum(start, calm_ns)
    late = rows["late"].to_numpy()
    stall = np.where(late, rows["stall"].to_numpy(), -1)
    fresh = np.zeros(len(rows), np.bool_)
    if len(length.time_ns):
        before = length.time_ns[np.maximum(np.searchsorted(length.time_ns, seen, side="right") - 1, 0)]
        fresh = np.abs(seen - before) <= STALE_NS
    frame = pd.DataFrame(
        {
            "last_normal": last_normal,
            "calm_ns": calm_ns,
            "stall": stall,
            "start_ns": start,
            "end_ns": seen,
            "overflows": rows["count"].to_numpy(),
            "from_normal": (start > calm_ns) & ~late,
            "fresh": fresh,
        }
    )
    groups = frame.groupby(["last_normal", "calm_ns", "stall"], sort=False)
    episodes = groups.agg(
        start_ns=("start_ns", "min"),
        end_ns=("end_ns", "max"),
        overflows=("overflows", "sum"),
        from_normal=("from_normal", "all"),
        fresh=("fresh", "all"),
    ).reset_index()
    order = episodes["start_ns"].argsort(kind="stable").to_numpy()
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    episodes = episodes.iloc[order].reset_index(drop=True)
    begin, end = episodes["start_ns"].to_numpy(), episodes["end_ns"].to_numpy()
    accepted, pause_ns = _accepts_in(tables, listener.pid, begin, end)
    growth = np.zeros(len(episodes), np.int64)
    limits = np.full(len(episodes), listener.limit, np.int64)
    if len(length.time_ns):
        growth, limits = np.maximum(length.at(end) - length.at(begin), 0), limit.at(end)
    return place[groups.ngroup().to_numpy()], episodes.drop(columns=["last_normal", "calm_ns"]).assign(
        listener=listener.index,
        pid=listener.pid,
        accepted=accepted,
        came=accepted + growth + episodes["overflows"],
        pause_ns=pause_ns,
        queue_limit=limits,
    )


def _last_normal(tables: Tables, listener: ListenerInfo, after: Ints) -> tuple[Ints, Ints]:
    """Return until when the queue was normal before each of these times, and a number for that moment.

    Unchanged samples leave no trace: a queue seen normal was so until one sampling before the next sample.
    Without any such sample the episode began with the recording.
    """
    length = listener_step(tables, listener.index, "queue_length")
    limit = listener_step(tables, listener.index, "queue_limit")
    normal = np.flatnonzero(length.value <= normal_length(limit.value))
    place = np.searchsorted(length.time_ns[normal], after, side="right") - 1
    started = np.minimum(after, tables.manifest.started_ns)
    if not len(normal):
        return started, np.full(len(after), -1, np.int64)
    sample = normal[np.maximum(place, 0)]
    following = np.append(length.time_ns, tables.end_ns)[sample + 1]
    until = np.minimum(np.maximum(length.time_ns[sample], following - tables.manifest.sample_ns), after)
    return np.where(place >= 0, until, started), np.where(place >= 0, sample, -1)


def _last_calm(frame: pd.DataFrame, pid: int, after: Ints) -> Ints:
    """Return when the last stall of the process before each of these times was over; 0: there was none.

    Its drain belongs to it where it ended before; what comes late in a drain is looked at from the stall's end.
    """
    mine = frame.loc[frame["pid"] == pid]
    calm = np.zeros(len(after), np.int64)
    end = (mine["start_ns"] + mine["duration_ns"]).to_numpy()
    for over in (end, end + mine["drain_ns"].to_numpy()):
        over = np.sort(over)
        calm = np.maximum(calm, np.concatenate([[0], over])[np.searchsorted(over, after, side="right")])
    return calm


def _accepts_in(tables: Tables, pid: int, begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """Return how many connections were accepted in each interval, and the longest time without one."""
    time = np.sort(tables.accepts.loc[tables.accepts["pid"] == pid, "start_ns"].to_numpy())
    low, high = np.searchsorted(time, begin, side="left"), np.searchsorted(time, end, side="right")
    some = high > low
    pause = end - begin
    if some.any():
        edges = np.maximum(time[low[some]] - begin[some], end[some] - time[high[some] - 1])
        pause[some] = np.maximum(edges, range_max(np.diff(time), low[some], high[some] - 1))
    return high - low, pause


def _with_cause(episodes: pd.DataFrame, tables: Tables, stalls: Stalls) -> pd.DataFrame:
    manifest = tables.manifest
    short_ns = 2 * manifest.stall_ns + 2 * manifest.sample_ns
    count = len(episodes)
    everywhere = np.ones(count, np.bool_)
    accepted, came = episodes["accepted"].to_numpy(), episodes["came"].to_numpy()
    span_ns = (episodes["end_ns"] - episodes["start_ns"]).to_numpy()
    # without a footer the end is the last thing known
    torn = (episodes["end_ns"].to_numpy() >= tables.end_ns - short_ns) & (not tables.recording.complete)
    tests: list[tuple[npt.NDArray[np.bool_], str, str]] = [
        (everywhere & (stalls.basis != ITERATIONS), NO_KNOWN_CAUSE, LOOP_UNSEEN),
        (everywhere & (tables.missing(ITERATION) > 0), NO_KNOWN_CAUSE, LOOP_LOST),
        (torn, NO_KNOWN_CAUSE, CUT_SHORT),
        (~episodes["fresh"].to_numpy(dtype=np.bool_), NO_KNOWN_CAUSE, QUEUE_UNSEEN),
        (episodes["from_normal"].to_numpy(dtype=np.bool_) & (span_ns <= short_ns), SMALL_BACKLOG, ""),
        ((accepted == 0) | (episodes["pause_ns"].to_numpy() > short_ns), NO_KNOWN_CAUSE, NOT_ACCEPTING),
        (accepted < came, SLOW_DRAIN, ""),
        (everywhere, NO_KNOWN_CAUSE, FAST_ENOUGH),
    ]
    which = np.argmax(np.stack([test for test, _, _ in tests]), axis=0) if count else np.zeros(0, np.int64)
    cause = np.array([cause for _, cause, _ in tests], dtype=object)[which]
    reason = np.array([reason for _, _, reason in tests], dtype=object)[which]
    # the queue has not been normal since that stall: only accepts that are too slow take the blame from it
    draining = (episodes["stall"] >= 0).to_numpy() & (cause != SLOW_DRAIN)
    cause[draining], reason[draining] = STALL, ""
    return episodes.drop(columns="fresh").assign(cause=cause, reason=reason)


def _no_episodes() -> pd.DataFrame:
    numbers = ("listener", "pid", "start_ns", "end_ns", "overflows", "accepted", "came", "pause_ns", "queue_limit")
    columns = {name: np.zeros(0, np.int64) for name in (*numbers, "stall")}
    return pd.DataFrame({**columns, "from_normal": np.zeros(0, np.bool_), "fresh": np.zeros(0, np.bool_)})


def _coincidence(tables: Tables, stalls: Stalls) -> Coincidence | None:
    known = stalls.overflows.loc[stalls.overflows["listener"] >= 0]
    # what is sampled is seen late, by up to one interval; every shift is given the same
    late_ns = 0 if (known["connection"] >= 0).all() else tables.manifest.sample_ns
    processes = []
    for pid in known["pid"].unique():
        mine, refused = stalls.frame.loc[stalls.frame["pid"] == pid], known.loc[known["pid"] == pid]
        begin = mine["start_ns"].to_numpy()
        end = begin + mine["duration_ns"].to_numpy() + late_ns
        processes.append(Series(begin, end, refused["seen_ns"].to_numpy(), refused["count"].to_numpy()))
    return compare_with_chance(processes, tables.manifest.started_ns, tables.end_ns)
