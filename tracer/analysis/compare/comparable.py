"""What must not be compared, each with its name and remedy: what differs is then not the server alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stallscope.probes import catalogue
from stallscope.tracer.analysis.compare.sides import ACCEPT_WAIT, OVERFLOWS, STALLS, Run, Side
from stallscope.tracer.analysis.stalls import ITERATIONS
from stallscope.tracer.manifest import CALL, Manifest
from stallscope.tracer.units import format_count, format_duration_ns

DEFAULT_LOAD_BAND = 0.25
"""By how much clients, connections/s and commands/s may differ from one side to the other, as a share."""

THRESHOLDS, PROBES, RUNGS, LOSSES, LOAD, SILENT, HOST, CUT_SHORT, NOTHING = (
    "thresholds", "probes", "rungs", "losses", "load", "silent", "host", "cut-short", "nothing",
)  # fmt: skip
KINDS = (THRESHOLDS, PROBES, RUNGS, LOSSES, LOAD, SILENT, HOST, CUT_SHORT, NOTHING)
WAIVABLE = (THRESHOLDS, PROBES, RUNGS, LOAD, SILENT, HOST)
"""What one may decide to overlook. A recording that lacks data proves nothing, whoever decides what."""

_RUNG_OF = {"event loop": STALLS, "overflows": OVERFLOWS, "listener": OVERFLOWS, "accept queue": ACCEPT_WAIT}


@dataclass(frozen=True)
class Obstacle:
    """One reason why the sides are not comparable.

    Attributes:
        kind: one of ``KINDS``; text: what differs, and the remedy.
        subjects: what it makes incomparable, () for everything.
    """

    kind: str
    text: str
    subjects: tuple[str, ...] = ()

    def touches(self, subject: str) -> bool:
        """Return whether a subject cannot be compared for it."""
        return not self.subjects or subject in self.subjects


@dataclass(frozen=True)
class Load:
    """One measure of load on both sides; None where it is not known.

    Attributes:
        name: ``clients``, ``connections/s`` or ``commands/s``.
        ratio: after to before; within: it is inside the band, or not known.
    """

    name: str
    before: float | None
    after: float | None
    ratio: float | None
    within: bool


def obstacles(before: Side, after: Side, load_band: float = DEFAULT_LOAD_BAND) -> list[Obstacle]:
    """Return everything that makes two sides incomparable."""
    everything = [*before.runs, *after.runs]
    found = unsound(before, "before") + unsound(after, "after")
    if any(one.kind == NOTHING for one in found):
        return found
    found += _thresholds(everything)
    found += _rungs(before, after)
    found += _functions(before, after)
    found += _load(before, after, load_band)
    found += _host(everything)
    return found


def unsound(side: Side, name: str) -> list[Obstacle]:
    """Return what makes recordings incomplete, whatever they are compared with: cut short, losses, nothing traced.

    Args:
        name: what to call the side.
    """
    found = []
    for run in side.runs:
        recording, path = run.analysis.recording, run.path
        if not recording.manifest.targets or not run.exposure_s:
            text = f"{path} ({name}) traced nothing: no server was watched in it; record one"
            found.append(Obstacle(NOTHING, text))
            continue
        if not recording.complete:
            text = f"{path} ({name}) was cut short: a stall in progress is not in it; record it again to its end"
            found.append(Obstacle(CUT_SHORT, text))
        found += _losses(run, name)
    return found


def _losses(run: Run, name: str) -> list[Obstacle]:
    counters = run.analysis.recording.counters
    if counters is None:
        text = f"{run.path} ({name}) has no counters: what was lost is not known; record it again"
        return [Obstacle(LOSSES, text)]
    probes = {probe.id: probe.name for probe in run.analysis.manifest.probes}
    lost = {probes.get(probe, str(probe)): item.missing for probe, item in counters.by_probe.items() if item.missing}
    damaged = run.analysis.tables.damaged_rows + run.analysis.tables.unknown_rows
    found = []
    if lost:
        what = ", ".join(f"{count:,} of {function}" for function, count in lost.items())
        text = f"{run.path} ({name}) lost events: {what}; record with a larger --ring-size or a --min-duration"
        found.append(Obstacle(LOSSES, text))
    if damaged:
        text = f"{run.path} ({name}) has {format_count(damaged, 'damaged row')}; record it again"
        found.append(Obstacle(LOSSES, text))
    missing = _rows_missing(run)
    if missing:
        text = f"{run.path} ({name}) lacks {format_count(missing, 'call')} that the kernel sent; record it again"
        found.append(Obstacle(LOSSES, text))
    return found


def _rows_missing(run: Run) -> int:
    counters = run.analysis.recording.counters
    if counters is None or not run.analysis.recording.complete:
        return 0
    calls = run.analysis.tables.calls
    finished = calls.loc[~calls["unfinished"], "probe"].value_counts()
    ids = [probe.id for probe in run.analysis.manifest.probes if probe.kind == CALL]
    return sum(
        max(counters.by_probe[probe].sent - int(finished.get(probe, 0)), 0)
        for probe in ids
        if probe in counters.by_probe
    )


def _thresholds(runs: Sequence[Run]) -> list[Obstacle]:
    found = []
    for option, subjects, of in (
        ("--min-duration", _functions_of(runs), lambda manifest: manifest.min_duration_ns),
        ("--stall", (STALLS,), lambda manifest: manifest.stall_ns),
        ("--sample", (OVERFLOWS, ACCEPT_WAIT), lambda manifest: manifest.sample_ns),
    ):  # type: str, tuple[str, ...], Callable[[Manifest], int]
        values = _by_value(runs, of)
        if len(values) > 1:
            told = "; ".join(f"{format_duration_ns(value)} in {paths}" for value, paths in values.items())
            found.append(Obstacle(THRESHOLDS, f"{option} differs: {told}; record both with the same", subjects))
    return found


def _by_value(runs: Iterable[Run], of: Callable[[Manifest], int]) -> dict[int, str]:
    values: dict[int, list[str]] = {}
    for run in runs:
        values.setdefault(of(run.analysis.manifest), []).append(run.path)
    return {value: _some(paths) for value, paths in values.items()}


def _some(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _functions_of(runs: Iterable[Run]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for run in runs for name in run.hits))


def _rungs(before: Side, after: Side) -> list[Obstacle]:
    found = []
    rungs = [
        {
            name: {run.analysis.manifest.rungs.get(name, "not measured") for run in side.runs}
            for name in _rung_names(side)
        }
        for side in (before, after)
    ]
    for name in dict.fromkeys([*rungs[0], *rungs[1]]):
        if name == "functions":
            continue
        one, two = (side.get(name, {"not measured"}) for side in rungs)
        if one != two or len(one) > 1:
            text = f"{name}: measured by {' or '.join(sorted(one))} before, by {' or '.join(sorted(two))} after"
            found.append(
                Obstacle(RUNGS, f"{text}; record both where the same is possible", (_RUNG_OF.get(name, name),))
            )
    bases = {run.analysis.stalls.basis for side in (before, after) for run in side.runs}
    if len(bases) > 1 and ITERATIONS in bases:
        found.append(Obstacle(RUNGS, "the event loop was observed in some recordings and not in others", (STALLS,)))
    return found


def _rung_names(side: Side) -> list[str]:
    return list(dict.fromkeys(name for run in side.runs for name in run.analysis.manifest.rungs))


def _functions(before: Side, after: Side) -> list[Obstacle]:
    found = []
    for name in before.names:
        if name in after.names:
            found += _same_function(before, after, name)
        elif before.hits(name):
            found.append(_gone(before, after, name))
        else:
            found.append(Obstacle(PROBES, f"{name} was traced before and not after; trace the same", (name,)))
    for name in after.names:
        if name not in before.names:
            found.append(Obstacle(PROBES, f"{name} was traced after and not before; trace the same", (name,)))
    return found


def _same_function(before: Side, after: Side, name: str) -> list[Obstacle]:
    rungs = [sorted({probe.rung for probe in side.probes(name)}) for side in (before, after)]
    if rungs[0] != rungs[1]:
        text = f"{name}: measured by {', '.join(rungs[0])} before, by {', '.join(rungs[1])} after"
        return [Obstacle(RUNGS, text, (name,))]
    elsewhere = [_elsewhere(side, name) for side in (before, after)]
    if elsewhere[0] != elsewhere[1]:
        where = elsewhere[1] or elsewhere[0]
        when = "after" if elsewhere[1] else "before"
        return [Obstacle(PROBES, f"{name} was measured elsewhere {when}: {where}; build both alike", (name,))]
    if before.hits(name) and not after.hits(name) and not why_silent(after, name):
        text = f"{name} never fired after and {format_count(before.hits(name), 'time')} before, which is not a fix"
        return [Obstacle(SILENT, f"{text}: {who_does_it_now(after, name)}", (name,))]
    return []


def _elsewhere(side: Side, name: str) -> str:
    """Return why the probes that stand for a function are in another one, "" if they are not."""
    notes = [probe.note for probe in side.probes(name) if "inlined" in probe.note or "bypassed" in probe.note]
    return notes[0] if notes else ""


def _gone(before: Side, after: Side, name: str) -> Obstacle:
    text = f"{name} fired {format_count(before.hits(name), 'time')} before and was not traced after, which is not a fix"
    return Obstacle(SILENT, f"{text}: {who_does_it_now(after, name)}", (name,))


def why_silent(side: Side, name: str) -> str:
    """Return why it is believed that a function which never fired was not called; "" where it is not.

    When it was attached, the recorder had read in the server's code that one of its callers calls it, and that it
    was not inlined there. So where such a caller ran, the function was not needed.
    """
    function = catalogue.lookup(name)
    probes = side.probes(name)
    if function is None or not probes or any(probe.note for probe in probes) or _moved(side, name):
        return ""
    ran = [caller for caller in function.callers if side.hits(caller)]
    if not ran or not all(probe.symbol.split(".")[0] == name for probe in probes):
        return ""
    return (
        f"{name} was not called, although {ran[0]}, whose code calls it, ran {format_count(side.hits(ran[0]), 'time')}"
    )


def who_does_it_now(side: Side, name: str) -> str:
    """Return where the work of a function went in the servers of a side, as far as probes and catalogue tell."""
    told = []
    for run in side.runs:
        manifest = run.analysis.manifest
        told += [note.text for note in manifest.notes if note.text.startswith(f"{name} is not traced")]
        told += [
            f"{probe.name} {part}"
            for probe in manifest.probes
            for part in probe.note.split("; ")
            if re.search(rf"also (stands for|named) {re.escape(name)}\b", part)
        ]
    if told:
        return f"{told[0]}; compare that function, or build both alike"
    moved = _moved(side, name)
    if moved:
        return f"{moved}; trace that with --probe on both sides"
    function = catalogue.lookup(name)
    if function is None:
        tells = "stallscope probes tells whether it was inlined or renamed"
        return (
            f"the catalogue does not know it; {tells}" if side.probes(name) else f"record with --probe {name}; {tells}"
        )
    names = [other for version, product in _servers(side)
             for other in catalogue.names_in(function, version, server=product) if other != name]  # fmt: skip
    if names:
        return (
            f"in this release {' or '.join(dict.fromkeys(names))} may do that work; trace it with --probe on both sides"
        )
    callers = [caller for caller in function.callers if side.hits(caller)]
    if callers:
        return f"its caller {callers[0]} ran; stallscope probes tells whether it was inlined there"
    return "nothing that calls it was seen to run; stallscope probes tells whether it was inlined or renamed"


def _servers(side: Side) -> list[tuple[catalogue.Version, str]]:
    targets = [target for run in side.runs for target in run.analysis.manifest.targets]
    known = [(catalogue.parse_version(target.version), target.product or "redis") for target in targets]
    return list(dict.fromkeys(known))


def _moved(side: Side, name: str) -> str:
    """Return where the catalogue says that the work of a function went in these releases, "" if it did not."""
    function = catalogue.lookup(name)
    for moved in function.moved if function is not None else ():
        for version, product in _servers(side):
            since = (moved.valkey_since if product == "valkey" else "") or moved.since
            if version and version >= catalogue.parse_version(since):
                return f"since {product} {since} {' and '.join(moved.instead)} does that work ({moved.why})"
    return ""


def loads(before: Side, after: Side, band: float) -> list[Load]:
    """Return each measure of load on both sides, and whether it is inside the band."""
    result = []
    for name, what in (
        ("clients", "clients"),
        ("connections/s", "connections_per_s"),
        ("commands/s", "commands_per_s"),
    ):
        one, two = before.mean(what), after.mean(what)
        if one is None or two is None:
            result.append(Load(name, one, two, None, True))
            continue
        greater, smaller = max(one, two), min(one, two)
        # one connection or command a second is nobody's load; one client, the recorder's question
        within = greater <= smaller * (1 + band) or greater - smaller <= 1
        result.append(Load(name, one, two, two / one if one else None, within))
    return result


def _load(before: Side, after: Side, band: float) -> list[Obstacle]:
    found = []
    for load in loads(before, after, band):
        if not load.within:
            text = f"the load differs: {load.before:,.1f} {load.name} before, {load.after:,.1f} after"
            found.append(
                Obstacle(
                    LOAD, f"{text}, outside the band of {band:.0%}; record under the same load, or set --load-band"
                )
            )
    return found


def _host(runs: Sequence[Run]) -> list[Obstacle]:
    found = []
    for key, label in (("machine", "architecture"), ("cpus", "number of CPUs"), ("cpu", "CPU"), ("kernel", "kernel")):
        values: dict[str, list[str]] = {}
        for run in runs:
            value = run.analysis.manifest.host.get(key, "")
            if value:
                values.setdefault(_release(value) if key == "kernel" else value, []).append(run.path)
        if len(values) > 1:
            told = "; ".join(f"{value} in {_some(paths)}" for value, paths in values.items())
            found.append(Obstacle(HOST, f"another host class, the {label} differs: {told}; record on like machines"))
    return found


def _release(kernel: str) -> str:
    return ".".join(kernel.split(".")[:2])
