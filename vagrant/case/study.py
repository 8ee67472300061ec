"""Writes CASE-STUDY.md: prose from the template, every number from the run's document."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from case import CaseError
from case.claims import failing
from case.columns import SMALL, STORM, Column, cells, headings
from case.figures import KINDS, Spread, change, confidence, interval, spread

TEMPLATE = Path(__file__).with_name("CASE-STUDY.md.j2")
PICTURES = "docs/case"
_SHOWN = ("article", "conditions", "variants", "left_out", "memory", "questions")
_EXPRESSION = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
_DIGIT = re.compile(r"\d")


def render(document: Mapping[str, Any], template: Path = TEMPLATE) -> str:
    """Return the study of a document of ``examine``.

    Raises:
        CaseError: the template has a typed figure, names what was not measured, or says what is not so in this run.
    """
    text = read_template(template)
    if untrue := failing(document):
        raise CaseError(f"in this run it is not so that {untrue[0]}; change the prose of {template.name} and claims.py")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                     keep_trailing_newline=True, autoescape=False)  # fmt: skip
    environment.filters |= KINDS
    facts = _Facts(document)
    try:
        written = environment.from_string(text).render(
            **{name: document[name] for name in _SHOWN},
            interval=facts.interval, median=facts.median, low=facts.low, high=facts.high, table=facts.table,
            changes=facts.changes, question=facts.question, picture=facts.picture, confidence=confidence,
            kept=facts.kept, storm=STORM, small=SMALL,
        )  # fmt: skip
    except jinja2.UndefinedError as error:
        raise CaseError(
            f"{template.name} needs what was not measured: {error}; run vagrant/case/run.py first"
        ) from None
    return re.sub(r"\n{3,}", "\n\n", written)


def read_template(template: Path = TEMPLATE) -> str:
    """Return the template's text.

    Raises:
        CaseError: a figure is typed in it.
    """
    text = template.read_text(encoding="utf-8")
    if typed := typed_figures(text):
        line, words = typed[0]
        raise CaseError(f"{template.name}:{line} has a typed figure: {words}; take it from the run's document")
    return text


def typed_figures(template: str) -> list[tuple[int, str]]:
    """Return the lines of a template with a digit outside its expressions, as (line number, the line)."""
    blanked = _EXPRESSION.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), template)
    lines = zip(template.splitlines(), blanked.splitlines(), strict=True)
    return [(number, line) for number, (line, prose) in enumerate(lines, 1) if _DIGIT.search(prose)]


class _Facts:
    """What the template may ask of a document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._variants: Mapping[str, Any] = document["variants"]

    def _spread(self, variant: str, metric: str) -> Spread:
        return spread([run[metric] for run in self._variants[variant]["runs"]])

    def interval(self, variant: str, metric: str, kind: str, missing: str = "-") -> str:
        """Return a metric's median and range over the runs of a variant."""
        return interval(self._spread(variant, metric), kind, missing, len(self._variants[variant]["runs"]))

    def median(self, variant: str, metric: str) -> float | None:
        """Return a metric's median."""
        return self._spread(variant, metric).median

    def low(self, variant: str, metric: str) -> float | None:
        """Return a metric's smallest value."""
        return self._spread(variant, metric).low

    def high(self, variant: str, metric: str) -> float | None:
        """Return a metric's largest value."""
        return self._spread(variant, metric).high

    def table(self, names: Sequence[str], columns: Sequence[Column]) -> str:
        """Return a table of those variants that were run, as Markdown."""
        rows = [cells(self._variants[name], columns) for name in names if name in self._variants]
        head = headings(columns)
        rule = ["---", "---", *("---:" for _ in head[2:])]
        return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])

    def question(self, name: str) -> str:
        """Return a command and its output, as a block."""
        asked = self._document["questions"][name]
        return f"```console\n$ {asked['command']}\n{asked['output']}\n```"

    def changes(self, name: str, *quantities: tuple[str, str]) -> str:
        """Return cells of a table with the changes that a question about a difference found."""
        found = {(one["subject"], one["quantity"]): one for one in self._document["questions"][name]["json"]["changes"]}
        return " | ".join(change(found.get(quantity)) for quantity in quantities)

    def picture(self, name: str, text: str) -> str:
        """Return a picture with its text."""
        return f"![{text}]({PICTURES}/{self._document['pictures'][name]['file']})"

    def kept(self, value_bytes: int, what: str) -> str:
        """Return how much more the patched server holds, run by run: the median and the range."""
        runs: dict[bool, list[float]] = {True: [], False: []}
        for run in self._document["memory"]:
            if run["value_bytes"] == value_bytes:
                runs[run["build"].endswith("-patched")].append(run["settled"][what])
        return interval(spread([after - before for before, after in zip(runs[False], runs[True], strict=True)]), "size")
