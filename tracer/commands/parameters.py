"""What several commands share: option types, and where output goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from stallscope.tracer.errors import UsageError
from stallscope.tracer.units import parse_bytes, parse_duration_ns, parse_offset_ns

if TYPE_CHECKING:
    from rich.console import Console


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.2 on
    """An option whose text one of our functions reads."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed value; a text that cannot be read ends with exit code 2."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


DURATION = Parsed("duration", parse_duration_ns)
OFFSET = Parsed("offset", parse_offset_ns)
SIZE = Parsed("size", parse_bytes)


def console() -> Console:
    """Return where tables go: stdout, in colour only on a terminal and without NO_COLOR, 80 columns in a pipe."""
    from rich.console import Console

    return Console(highlight=False)
