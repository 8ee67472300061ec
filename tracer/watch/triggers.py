"""Triggers: what is worth a capture, as people write it (``stall>50ms``); ``evaluation`` says when it is.

==================================== =======================================================================
trigger                              comes true
==================================== =======================================================================
``stall>50ms``                       an event loop iteration takes longer, also while it still does;
                                     ``iteration>50ms`` is the same
``call:je_pages_purge>5ms``          a call of the function takes longer, also while it still does
``overflow>0``                       connections were refused because a watched accept queue was full: more
                                     than so many within 1s, or ``overflow>100 in 10s``
``drop>0``                           a watched listener dropped requests, for any reason
``backlog>80%``, ``backlog>400``     an accept queue holds more, of its limit or connections, at a sample;
                                     ``backlog>80% for 100ms``: without a break
``wait>100ms``                       a connection waited longer for accept() (where the kernel is hooked)
``lost>0``                           the tracer lost events, within 1s or ``in`` another time
==================================== =======================================================================

``>=`` in place of ``>`` counts the bound itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from stallscope.tracer.errors import UsageError
from stallscope.tracer.units import parse_duration_ns

STALL, CALL_TIME, OVERFLOW, DROP, BACKLOG, WAIT, LOST = "stall", "call", "overflow", "drop", "backlog", "wait", "lost"
QUANTITIES = (STALL, "iteration", "call:FUNCTION", OVERFLOW, DROP, BACKLOG, WAIT, LOST)
DEFAULT_WINDOW_NS = 1_000_000_000
"""In how much time overflows, drops and lost events are counted unless the trigger says otherwise."""

_FORM = re.compile(r"(?P<quantity>[^<>=]*?)\s*(?P<sign>>=|<=|==|[<>=])\s*(?P<rest>.*)", re.DOTALL)
_TAIL = re.compile(r"(?P<bound>.*?)(?:\s+(?P<word>for|in)\s+(?P<time>.*))?", re.DOTALL)
_COUNT = re.compile(r"[0-9]{1,12}")
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)\s*%")
SPANS = (STALL, CALL_TIME, WAIT)
COUNTED = (OVERFLOW, DROP, LOST)
_EXAMPLES = "as stall>50ms, overflow>0, 'backlog>80% for 100ms' or call:je_pages_purge>5ms"


@dataclass(frozen=True)
class Trigger:
    """One condition.

    Attributes:
        text: as it was written, without needless blanks; quantity: one of the module's names.
        function: of ``call``, "" for others.
        bound: ns, number or percent; inclusive: the bound itself counts.
        percent: the bound is a share of the accept queue's limit.
        time_ns: ``for`` of a backlog; ``in`` of overflows, drops and lost events.
    """

    text: str
    quantity: str
    bound: float
    function: str = ""
    inclusive: bool = False
    percent: bool = False
    time_ns: int = 0

    def exceeds(self, value: float) -> bool:
        """Return whether a value is beyond the bound."""
        return value >= self.bound if self.inclusive else value > self.bound

    @property
    def unit(self) -> str:
        """Return the unit of the bound and of a firing's value: ``ns``, ``%``, ``connections``, ``events``."""
        if self.quantity in SPANS:
            return "ns"
        if self.percent:
            return "%"
        return "events" if self.quantity == LOST else "connections"


def parse_trigger(text: str) -> Trigger:
    """Return the trigger written as ``stall>50ms`` or ``backlog>80% for 100ms``; the module says what there is.

    Raises:
        UsageError: it cannot be read; says which part, and what would be right.
    """
    form = _FORM.fullmatch(text.strip())
    if form is None:
        raise UsageError(f'cannot read the trigger "{text}": it compares nothing; write QUANTITY>BOUND, {_EXAMPLES}')
    quantity, _, function = (part.strip() for part in form["quantity"].partition(":"))
    if form["sign"] not in (">", ">="):
        raise UsageError(f'cannot read the trigger "{text}": only > and >= are compared, not {form["sign"]}')
    quantity = STALL if quantity == "iteration" else quantity
    if quantity not in (*SPANS, *COUNTED, BACKLOG):
        raise UsageError(
            f'cannot read the trigger "{text}": "{form["quantity"]}" is not known; there are {", ".join(QUANTITIES)}'
        )
    if (quantity == CALL_TIME) != bool(function):
        what = f"{quantity} takes no name" if function else "which function's calls? write call:FUNCTION"
        raise UsageError(f'cannot read the trigger "{text}": {what}, {_EXAMPLES}')
    tail = _TAIL.fullmatch(form["rest"])
    assert tail is not None  # it matches any text
    bound, percent = _bound(text, quantity, tail["bound"].strip())
    if not bound and (quantity in SPANS or form["sign"] == ">="):
        raise UsageError(f'cannot read the trigger "{text}": it would always be true; give a bound above 0')
    time_ns = _time(text, quantity, tail["word"] or "", (tail["time"] or "").strip())
    name = f"{quantity}:{function}" if function else quantity
    words = f" {tail['word']} {tail['time'].strip()}" if tail["word"] else ""
    return Trigger(
        f"{name}{form['sign']}{tail['bound'].strip()}{words}", quantity, bound, function, form["sign"] == ">=",
        percent, time_ns,
    )  # fmt: skip


def parse_triggers(texts: Iterable[str]) -> tuple[Trigger, ...]:
    """Return the triggers, each once, in their order; raises UsageError for the first that cannot be read."""
    return tuple({trigger.text: trigger for trigger in map(parse_trigger, texts)}.values())


def _bound(text: str, quantity: str, bound: str) -> tuple[float, bool]:
    if not bound:
        raise UsageError(f'cannot read the trigger "{text}": the bound is missing; write one, {_EXAMPLES}')
    if quantity in SPANS:
        try:
            return float(parse_duration_ns(bound)), False
        except UsageError as error:
            raise UsageError(f'cannot read the trigger "{text}": {error}') from error
    match = _PERCENT.fullmatch(bound)
    if match and quantity == BACKLOG:
        if float(match[1]) > 100:
            raise UsageError(f'cannot read the trigger "{text}": a share of the limit is at most 100%')
        return float(match[1]), True
    if not _COUNT.fullmatch(bound):
        what = "a number of connections, as 400, or a share of the limit, as 80%" if quantity == BACKLOG else "a number"
        raise UsageError(f'cannot read the trigger "{text}": "{bound}" is not {what}')
    return float(bound), False


def _time(text: str, quantity: str, word: str, time: str) -> int:
    wanted = "for" if quantity == BACKLOG else "in" if quantity in COUNTED else ""
    if not word:
        return DEFAULT_WINDOW_NS if wanted == "in" else 0
    if word != wanted:
        other = f'; it takes "{wanted} DURATION"' if wanted else ""
        raise UsageError(f'cannot read the trigger "{text}": "{word}" means nothing with {quantity}{other}')
    try:
        time_ns = parse_duration_ns(time)
    except UsageError as error:
        raise UsageError(f'cannot read the trigger "{text}": {error}') from error
    if wanted == "in" and not time_ns:
        raise UsageError(f'cannot read the trigger "{text}": nothing happens in no time; write "in 1s"')
    return time_ns


def functions_of(triggers: Iterable[Trigger]) -> tuple[str, ...]:
    """Return the functions whose calls triggers ask for: their probes have to be attached all the time."""
    return tuple(dict.fromkeys(trigger.function for trigger in triggers if trigger.function))


def shortest_ns(triggers: Iterable[Trigger], quantity: str, otherwise_ns: int) -> int:
    """Return the smallest bound of ``STALL`` or ``CALL_TIME`` triggers: shorter spans need not be recorded for them."""
    return min((int(trigger.bound) for trigger in triggers if trigger.quantity == quantity), default=otherwise_ns)
