"""A recording worked through once: what every report, export and comparison starts from."""

from __future__ import annotations

from dataclasses import dataclass

from stallscope.tracer.analysis.blame import Blame, assign_blame
from stallscope.tracer.analysis.nesting import Nested, nest
from stallscope.tracer.analysis.samples import Samples
from stallscope.tracer.analysis.stalls import Stalls, find_stalls
from stallscope.tracer.analysis.tables import Tables, build_tables
from stallscope.tracer.analysis.trees import Trees, find_trees
from stallscope.tracer.analysis.whatif import Trims, find_trims
from stallscope.tracer.manifest import Manifest
from stallscope.tracer.recording import Recording


@dataclass(frozen=True)
class Analysis:
    """One recording's rows by kind, its calls with their places in the call tree, its stalls, and what caused what.

    Attributes:
        tables: all rows, by kind; nested: the calls with parent, depth, self time and path.
        stalls: the stalls with the accept queue, the calls and the overflows around them.
        trees: the slow calls that nothing encloses, with everything they called.
        blame: every overflow with its cause.
        samples: the stack samples, by stall.
        trims: the trims of query buffers, which :func:`whatif.what_if` asks about.
    """

    tables: Tables
    nested: Nested
    stalls: Stalls
    trees: Trees
    blame: Blame
    trims: Trims
    samples: Samples

    @property
    def recording(self) -> Recording:
        """Return the recording itself."""
        return self.tables.recording

    @property
    def manifest(self) -> Manifest:
        """Return the recording's manifest."""
        return self.tables.manifest


def analyse(recording: Recording) -> Analysis:
    """Return a recording worked through.

    Raises:
        RecordingError: the probe list contradicts the format.
    """
    tables = build_tables(recording)
    nested = nest(tables.calls, tables.iterations)
    stalls = find_stalls(tables, nested)
    return Analysis(
        tables,
        nested,
        stalls,
        find_trees(tables, nested, stalls.frame),
        assign_blame(tables, stalls),
        find_trims(tables, nested, stalls),
        Samples(tables, stalls),
    )
