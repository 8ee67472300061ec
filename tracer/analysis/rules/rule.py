"""What a rule is, and what all rules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.findings import Evidence, Finding

KEPT_EVIDENCE = 8
"""So many facts of one kind are evidence enough."""


@dataclass(frozen=True)
class Found:
    """What a rule's function found: a finding without its rule's name and remedy.

    Attributes:
        weight, title, evidence: as in :class:`findings.Finding`.
        places: what fills the places of the rule's remedy.
    """

    weight: str
    title: str
    evidence: tuple[Evidence, ...] = ()
    places: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """One thing to look for.

    Attributes:
        name: what the finding is known by, in JSON too; never changed.
        remedy: what to do; ``{places}`` are filled by what was found. "" when nothing is to be done.
        find: returns what it found in a recording, usually nothing or one.
    """

    name: str
    remedy: str
    find: Callable[[Analysis], Iterable[Found]]

    def apply(self, analysis: Analysis) -> list[Finding]:
        """Return the findings in a recording."""
        return [
            Finding(self.name, found.weight, found.title, self.remedy.format(**found.places), found.evidence)
            for found in self.find(analysis)
        ]


def refused(times: int) -> str:
    """Return that connections were refused so often; every refusal of one counts, as the kernel counts."""
    return "a connection was refused once" if times == 1 else f"connections were refused {times:,} times"


def since_start(analysis: Analysis, time_ns: int) -> int:
    """Return a time as evidence has it: since the recording's start."""
    return int(time_ns) - analysis.manifest.started_ns
