"""What a recording says, in words: each finding with its evidence and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stallscope.tracer.analysis.analysis import Analysis

CAUSE, CONTRIBUTES, CLEARED, NOTICE = "cause", "contributes", "cleared", "notice"
WEIGHTS = (CAUSE, CONTRIBUTES, NOTICE, CLEARED)
"""What a finding is to the refused connections, the weightiest first; ``cleared``: something that is not to blame."""


@dataclass(frozen=True)
class Evidence:
    """One fact behind a finding, such as one stall, one call, one sysctl.

    Attributes:
        text: the fact in words, with units.
        start_ns: since the recording's start, None for what has no time; duration_ns: 0 for an instant.
    """

    text: str
    start_ns: int | None = None
    duration_ns: int = 0


@dataclass(frozen=True)
class Finding:
    """One thing a recording shows.

    Attributes:
        rule: name of the rule that found it; weight: one of ``WEIGHTS``.
        title: one sentence with its numbers; remedy: what to do, "" when nothing is to be done.
        evidence: the facts, the weightiest first.
    """

    rule: str
    weight: str
    title: str
    remedy: str
    evidence: tuple[Evidence, ...] = ()


def find_findings(analysis: Analysis) -> tuple[Finding, ...]:
    """Return what a recording shows, the weightiest first; of one weight, in the order of the rules."""
    from stallscope.tracer.analysis.rules import RULES

    found = [finding for rule in RULES for finding in rule.apply(analysis)]
    return tuple(sorted(found, key=lambda finding: WEIGHTS.index(finding.weight)))
