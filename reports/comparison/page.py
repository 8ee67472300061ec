"""The comparison as one offline page: what changed as a table, and both sides drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from stallscope.reports.comparison.compute import ComparedSides, Distribution, SideTimeline
from stallscope.reports.timeline.columns import gzip_text
from stallscope.reports.timeline.document import script_json
from stallscope.reports.timeline.tables import Table

_SHARED = "stallscope.reports.timeline"
_OWN = "stallscope.reports.comparison"
_SCRIPTS = ((_SHARED, "format.js"), (_SHARED, "inflate.js"), (_OWN, "comparison.js"))


@dataclass(frozen=True)
class PageText:
    """The words of the page.

    Attributes:
        title: of the window; verdict: the sentence on top; mood: ``calm``, ``trouble`` or ``unknown``.
        sources: one line a side, what was compared with what.
        warnings: what makes the sides hard to compare.
        notes: how intervals and significance were found.
    """

    title: str
    verdict: str
    mood: str
    sources: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def render(text: PageText, tables: Sequence[tuple[str, Table]], sides: ComparedSides) -> str:
    """Return the page: HTML that needs nothing but a browser.

    Args:
        tables: what changed, as (heading, table).
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    return environment.from_string(_asset(_OWN, "comparison.html")).render(
        text=text,
        tables=tables,
        functions=list(sides.distributions),
        has_calls=bool(sides.distributions),
        style=Markup(_asset(_SHARED, "page.css") + _asset(_OWN, "comparison.css")),
        document=Markup(script_json(describe(sides))),
        plotly=gzip_text(get_plotlyjs()),
        scripts=Markup("\n".join(_asset(package, name) for package, name in _SCRIPTS)),
    )


def describe(sides: ComparedSides) -> dict[str, Any]:
    """Return what the page's script reads."""
    return {
        "elapsed_ns": sides.elapsed_ns,
        "timelines": [_timeline(timeline) for timeline in sides.timelines],
        "distributions": [
            {"name": name, "sides": [_distribution(side) for side in found]}
            for name, found in sides.distributions.items()
        ],
        "graph": [
            {
                "name": node.name,
                "parent": node.parent,
                "self": [round(node.before), round(node.after)],
                "total": [round(node.before_total), round(node.after_total)],
            }
            for node in sides.graph
        ],
    }


def _timeline(timeline: SideTimeline) -> dict[str, Any]:
    filled = np.flatnonzero(~np.isnan(timeline.queue_share))
    refused = np.flatnonzero(timeline.refused)
    return {
        "side": timeline.side,
        "name": timeline.name,
        "server": timeline.server,
        "elapsed_ns": timeline.elapsed_ns,
        "bin_ns": timeline.bin_ns,
        "stalls": {
            "start_ns": timeline.stall_start_ns.tolist(),
            "duration_ns": timeline.stall_duration_ns.tolist(),
            "refused": timeline.stall_refused.tolist(),
            "left": timeline.stalls_left,
        },
        "queue": {"bin": filled.tolist(), "share": np.round(timeline.queue_share[filled], 4).tolist()},
        "refused": {"bin": refused.tolist(), "count": timeline.refused[refused].tolist()},
    }


def _distribution(distribution: Distribution) -> dict[str, Any]:
    return {
        "side": distribution.side,
        "calls": distribution.calls,
        "short": distribution.short,
        "duration_ns": distribution.duration_ns.tolist(),
        "share": distribution.share.tolist(),
    }


def _asset(package: str, name: str) -> str:
    return files(package).joinpath("assets", name).read_text(encoding="utf-8")
