"""The sentence a database administrator reads first, and what limits it."""

from __future__ import annotations

from stallscope.tracer.analysis.blame import NO_KNOWN_CAUSE
from stallscope.tracer.analysis.imported import imported_sentence
from stallscope.tracer.analysis.nesting import Nested
from stallscope.tracer.analysis.requests import ACCEPTED, ENQUEUED, SYN_TAKEN, event_hits
from stallscope.tracer.analysis.samples import NO_CPU
from stallscope.tracer.analysis.stall_summary import StallSummary
from stallscope.tracer.analysis.stalls import ITERATIONS
from stallscope.tracer.analysis.summary import Summary
from stallscope.tracer.analysis.tables import Tables
from stallscope.tracer.manifest import CALL, LISTENER
from stallscope.tracer.units import format_count, format_duration_ns


def sentence(summary: Summary) -> str:
    """Return which call blocked Redis, for how long, and how many connections were refused meanwhile.

    Without a stall it says what else was seen, or what was looked at when nothing was.
    """
    if summary.stalls:
        return f"{_of_stalls(summary)}{_limits(summary)}"
    if summary.overflows.total:
        return f"{_of_overflows(summary)}{_limits(summary)}"
    return f"{_of_nothing(summary)}{_limits(summary)}"


def warnings(summary: Summary, tables: Tables, nested: Nested) -> tuple[str, ...]:
    """Return everything that makes the numbers incomplete, one line each, with the remedy if there is one."""
    lines = []
    if not summary.complete:
        lines.append("the recording was cut short: calls and event loop iterations that had not ended are not in it")
    if summary.stall_basis != ITERATIONS and summary.targets:
        lines.append("the event loop was not observed: calls of the main thread stand for stalls")
    listener_events = {probe.name for probe in tables.manifest.probes if probe.kind == LISTENER}
    for loss in summary.losses:
        if loss.lost and loss.name in listener_events:
            lines.append(f"{loss.name}: {loss.lost:,} were counted and not recorded, the ring buffer was full")
        elif loss.lost:
            lines.append(f"{loss.name}: {loss.lost:,} calls were seen and could not be kept; record fewer functions")
    for function in summary.functions:
        if function.unpaired and not function.lost:
            lines.append(f"{function.name}: {function.unpaired:,} calls were under way when it was attached")
        if function.abandoned:
            lines.append(f"{function.name}: {function.abandoned:,} calls never returned (longjmp) and are left out")
    if summary.sampled and summary.sampled.lost:
        lines.append(
            f"stack samples: {summary.sampled.lost:,} of {summary.sampled.lost + summary.sampled.samples:,} were lost, "
            "unwinding did not keep up; use a lower --stack-rate, or --stacks=stalls"
        )
    silent = ", ".join(function.name for function in summary.functions if function.counted and not function.hits)
    if silent:
        why = "not called, or inlined or bypassed: stallscope probes tells"
        lines.append(f"attached, but never fired: {silent}; {why}")
    for item in summary.reconciliation:
        if item.one_by_one and item.unexplained:
            lines.append(
                f"overflows the kernel counted: {item.counted:,}; seen one by one: {item.observed:,}; "
                f"unexplained: {item.unexplained:,}"
            )
        elif item.counted is not None and item.observed != item.counted:
            lines.append(
                f"observed {item.observed:,} of {item.counted:,} overflows the kernel counted; the rest has no time"
            )
    if summary.requests and _accept_queue_unseen(tables):
        lines.append(
            "SYNs were taken and connections accepted, but the hooks at the accept queue saw none: waits there are "
            "not known, and who got in is told by SYNs"
        )
    if tables.damaged_rows or tables.unknown_rows:
        lines.append(f"{tables.damaged_rows + tables.unknown_rows:,} rows are damaged or unknown and were left out")
    if nested.crossing:
        lines.append("calls cross each other, which cannot be: the recording is damaged, self times are not exact")
    return (*lines, *_rows_missing(summary, tables))


def _accept_queue_unseen(tables: Tables) -> bool:
    hits = event_hits(tables)
    accepted = bool((tables.accepts["fd"] >= 0).any())
    return accepted and hits.get(SYN_TAKEN, 0) > 0 and not hits.get(ENQUEUED, 0) and not hits.get(ACCEPTED, 0)


def _of_stalls(summary: Summary) -> str:
    worst = max(summary.stalls, key=lambda stall: (stall.overflows + stall.overflows_drain, stall.duration_ns))
    refused = worst.overflows + worst.overflows_drain
    length = format_duration_ns(worst.duration_ns)
    at_least = "at least " if worst.unfinished else ""
    which = f"Redis ({worst.listener or f'process {worst.pid}'})" if len(summary.targets) > 1 else "Redis"
    text = f"{which} was blocked for {at_least}{length}{_by(worst)}"
    if refused:
        text += f"; meanwhile {_refused(refused, worst.connections_refused)}"
    elif worst.queue_max is None:
        text += "; the accept queue was not observed"
    else:
        text += f"; no connection was refused (accept queue at most {worst.queue_max:,} of {worst.queue_limit:,})"
    text += "."
    elsewhere = _refused if worst.connections_refused is None else _refusals
    others = sum(listener.overflows.total for listener in summary.listeners) - refused
    if summary.stall_count > 1:
        together = format_duration_ns(summary.stall_total_ns)
        text += f" It is the worst of {summary.stall_count:,} stalls, {together} together"
        text += f"; {elsewhere(others)} at other times." if others > 0 else "."
    elif others > 0:
        text += f" At other times {elsewhere(others)}."
    return text


def _by(stall: StallSummary) -> str:
    what = f"{stall.sampled_in} (by sampled stacks, not traced)" if stall.sampled_in else ""
    if stall.sampled_in == NO_CPU and not stall.blamed:
        return ", mostly for want of a CPU (by sampled stacks)"
    if not stall.functions:
        return f" by {what or 'something that was not traced'}"
    if not stall.blamed:
        if what:
            return f", mostly in {what}"
        return f", {format_duration_ns(stall.unexplained_ns)} of it by something that was not traced"
    first = stall.functions[0]
    calls = f"{first.calls:,} calls of {first.name}" if first.calls > 1 else f"one call of {first.name}"
    callers = f" (called by {' > '.join(stall.blamed[:-1])})" if len(stall.blamed) > 1 else ""
    return f": {format_duration_ns(first.self_ns)} of it in {calls}{callers}"


def _of_overflows(summary: Summary) -> str:
    text = f"{_refused(summary.overflows.total, summary.connections_refused).capitalize()}, but no stall was recorded"
    fullest = max(summary.listeners, key=lambda item: item.queue_max or 0, default=None)
    if fullest is not None and fullest.queue_max is not None:
        text += f" (accept queue of {fullest.address} at most {fullest.queue_max:,} of {fullest.queue_limit:,})"
    if summary.reconciliation and not any(listener.overflows.total for listener in summary.listeners):
        text += "; none can be attributed to the listeners that were watched"
    known = [cause for cause, number in summary.blame.causes.items() if number and cause != NO_KNOWN_CAUSE]
    return f"{text}; cause: {' and '.join(known)}." if known else f"{text}."


def _of_nothing(summary: Summary) -> str:
    fired = [function for function in summary.functions if function.calls]
    looked = []
    if summary.loop and summary.loop.iterations:
        limit = format_duration_ns(summary.stall_ns)
        looked.append(f"{format_count(summary.loop.iterations, 'event loop iteration')}, all shorter than {limit}")
    if fired:
        calls = sum(function.calls for function in fired)
        looked.append(f"{format_count(calls, 'call')} of {format_count(len(fired), 'function')}")
    sampled = [listener for listener in summary.listeners if listener.queue_max is not None]
    if sampled:
        fullest = max(sampled, key=lambda item: item.queue_max or 0)
        looked.append(f"an accept queue of at most {fullest.queue_max:,} of {fullest.queue_limit:,}, no overflows")
    if not looked and summary.imported and (told := imported_sentence(summary.imported)):
        return f"Nothing was traced. {told}"
    if not looked:
        return f"Nothing was observed in {format_duration_ns(summary.elapsed_ns)}: this says nothing about Redis."
    return f"Nothing wrong was seen in {format_duration_ns(summary.elapsed_ns)}: {'; '.join(looked)}."


def _limits(summary: Summary) -> str:
    text = ""
    lost = sum(loss.lost for loss in summary.losses)
    if lost:
        text += f" {lost:,} events were lost, so this is not the whole picture."
    unseen = sum(max(item.unexplained or 0, 0) for item in summary.reconciliation)
    if unseen:
        text += f" The kernel counted {unseen:,} more {'refusal' if unseen == 1 else 'refusals'} that were not seen."
    if not summary.complete:
        text += " The recording was cut short, a stall in progress is not in it."
    return text


def _refused(times: int, connections: int | None = None) -> str:
    """Return how many connections were refused; where that is not known, every refusal counts as one."""
    count = times if connections is None else connections
    text = "one connection was refused" if count == 1 else f"{count:,} connections were refused"
    return text if count == times else f"{text} {times:,} times"


def _refusals(times: int) -> str:
    return "there was one refusal" if times == 1 else f"there were {times:,} refusals"


def _rows_missing(summary: Summary, tables: Tables) -> list[str]:
    """Return a line for each function of which fewer rows are in the file than the kernel sent."""
    counters = tables.recording.counters
    if counters is None or not summary.complete:
        return []
    lines = []
    ids = {probe.id for probe in tables.manifest.probes if probe.kind == CALL}
    for function in summary.functions:
        sent = counters.by_probe[function.probe].sent if function.probe in counters.by_probe else 0
        missing = sent - (function.recorded - function.unfinished)
        if function.probe in ids and missing > 0:
            lines.append(f"{function.name}: {missing:,} of {sent:,} recorded calls are not in the file")
    return lines
