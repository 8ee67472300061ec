"""What one input of an import holds, before it is put on a recording's clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from stallscope.probes.catalogue import Field
from stallscope.tracer.layout import EVENT, NO_STACK
from stallscope.tracer.manifest import IMPORTED_SPAN, ProbeInfo

NS_PER_S = 1_000_000_000
MAX_TEXT = 300
"""Characters kept of a command; Redis itself keeps 32 arguments of 128."""

FIRST_WALL_S, LAST_WALL_S = 1_000_000_000, 4_000_000_000
"""What is taken for a time in whole seconds since 1970: 2001 to 2096."""

SPAN_FIELDS = (Field("uncertain_ns", "ns", 0),)


@dataclass(frozen=True)
class Input:
    """The rows of one input, on its own clock.

    Attributes:
        file, format: as in :class:`manifest.ImportInfo`.
        rows: dtype ``EVENT``, shape (n,): ``start_ns`` since 1970, ``probe`` a place in ``probes``, ``stack`` a place
            in ``texts`` or ``NO_STACK``.
        counts, notes: what was counted, and what makes it incomplete.
    """

    file: str
    format: str
    rows: npt.NDArray[np.void]
    probes: tuple[ProbeInfo, ...] = ()
    texts: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Span:
    """Something that took time, as Redis tells it: when it ended, in whole seconds, and how long it took."""

    source: str
    ended_s: int
    duration_ns: int
    text: str = ""


def spans_input(file: str, form: str, rung: str, spans: Sequence[Span], counts: dict[str, int]) -> Input:
    """Return spans as the rows of an input.

    A span ended at any time in the second that is told: its row has the earliest start, and what it may be later.
    """
    sources = list(dict.fromkeys(span.source for span in spans))
    texts = list(dict.fromkeys(span.text for span in spans if span.text))
    source_places = {name: place for place, name in enumerate(sources)}
    text_places = {text: place for place, text in enumerate(texts)}
    rows = np.zeros(len(spans), EVENT)
    rows["start_ns"] = [max(span.ended_s * NS_PER_S - span.duration_ns, 0) for span in spans]
    rows["duration_ns"] = [span.duration_ns for span in spans]
    rows["value"][:, 0] = NS_PER_S
    rows["probe"] = [source_places[span.source] for span in spans]
    rows["stack"] = [text_places.get(span.text, NO_STACK) for span in spans]
    probes = tuple(ProbeInfo(place, name, IMPORTED_SPAN, rung, SPAN_FIELDS) for place, name in enumerate(sources))
    return Input(file, form, rows, probes, tuple(texts), counts)


def shortened(text: str) -> str:
    """Return a text of at most ``MAX_TEXT`` characters."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."


def is_wall_s(value: object) -> bool:
    """Return whether this is an integer that may be a time in seconds since 1970."""
    return isinstance(value, int) and FIRST_WALL_S <= value < LAST_WALL_S


def renamed(inputs: Iterable[Input], file: str) -> list[Input]:
    """Return the inputs under the name of the file they came from."""
    return [replace(item, file=file) for item in inputs]
