"""What is done with a capture once it has its name: findings, a page, a command. Never in the way of watching.

Each of these runs in a child process, one capture after the other, in a thread that only waits for them: pandas is
never loaded here. Each has a time limit; what fails is told and goes no further.

The command is run by ``/bin/sh -c`` in a session of its own, with the rights of the watch and the capture's path in
``STALLSCOPE_CAPTURE``. On stdin it gets one JSON document::

    {"capture": PATH, "complete": true, "report": PATH or null, "triggers": [...],
     "verdict": "...", "findings": [...], "summary": {...}}   # as of stallscope summary --json

``verdict``, ``findings`` and ``summary`` are null where the capture could not be analysed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stallscope.tracer.units import format_duration_ns
from stallscope.tracer.watch.priority import run_normally
from stallscope.tracer.watch.writer import Finished

ANALYSIS_NS = 300_000_000_000
"""Time limit of the analysis and of the page: they are slow on large captures, and never hang."""

VERDICT = "verdict"
"""The step whose result is the capture's verdict, a sentence or two."""

MAX_WAITING = 8
"""Captures that wait for their turn; of more the oldest are passed over, and this is told."""

_MAX_DOCUMENT_BYTES = 64 * 2**20
_NICENESS = 10
_COMMAND_LINE = (sys.executable, "-c", "from stallscope.tracer.cli import main; main()")
_MAX_RESULTS = 256


@dataclass(frozen=True)
class AfterResult:
    """How one step for one capture ended.

    Attributes:
        step: ``summary``, ``report`` or ``exec``; ok: it did what it should.
        text: what happened, in one line. elapsed_ns: how long it took.
    """

    capture: Path
    step: str
    ok: bool
    text: str
    elapsed_ns: int


class Aftercare:
    """Runs these steps in the background."""

    def __init__(
        self, command: str = "", *, report: bool = False, command_ns: int = 60_000_000_000, verdict: bool = False
    ) -> None:
        """Begin with nothing to do; all of this may be changed later, for the captures that follow.

        Args:
            command: for /bin/sh, "" for none; command_ns: its time limit. report: draw a page.
            verdict: tell each capture's verdict, as the result of a step of this name.
        """
        self.verdict = verdict
        self.command = command
        self.report = report
        self.command_ns = command_ns
        self._condition = threading.Condition()
        self._waiting: deque[Finished] = deque()
        self._results: deque[AfterResult] = deque(maxlen=_MAX_RESULTS)
        self._child: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._is_busy = False
        self._thread: threading.Thread | None = None

    def submit(self, capture: Finished) -> None:
        """Have everything done for a capture; returns at once."""
        if capture.path is None or not (self.command or self.report or self.verdict):
            return
        with self._condition:
            if len(self._waiting) >= MAX_WAITING:
                passed = self._waiting.popleft()
                assert passed.path is not None
                text = "passed over: captures come faster than they are worked up"
                self._results.append(AfterResult(passed.path, "exec" if self.command else "report", False, text, 0))
            self._waiting.append(capture)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="aftercare", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def take_results(self) -> list[AfterResult]:
        """Return how the steps since the last call ended."""
        with self._condition:
            found = list(self._results)
            self._results.clear()
        return found

    def close(self, timeout_s: float = 10.0) -> None:
        """Let what is under way and waiting end within the time, then kill it."""
        limit = time.monotonic() + timeout_s
        with self._condition:
            while (self._waiting or self._is_busy) and time.monotonic() < limit:
                self._condition.wait(max(limit - time.monotonic(), 0))
            self._is_closed = True
            self._waiting.clear()
            if self._child is not None:
                _kill(self._child)
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join(5.0)

    def _work(self) -> None:
        run_normally()
        while True:
            with self._condition:
                self._is_busy = False
                self._condition.notify_all()
                while not self._waiting and not self._is_closed:
                    self._condition.wait()
                if self._is_closed:
                    return
                capture = self._waiting.popleft()
                self._is_busy = True
            self._care(capture)

    def _care(self, capture: Finished) -> None:
        path = capture.path
        assert path is not None
        # absolute: the children have another present folder, a command may change its own
        place = path.absolute()
        page = place.with_suffix(".html") if self.report else None
        if page is not None:
            ok, _ = self._stallscope(path, "report", [str(place), "-o", str(page)])
            page = page if ok else None
        if not (self.command or self.verdict):
            return
        ok, output = self._stallscope(path, "summary", ["--json", str(place)])
        summary: dict[str, Any] | None = None
        if ok:
            with suppress(ValueError):
                summary = json.loads(output)
        if self.verdict and summary is not None:
            with self._condition:
                self._results.append(AfterResult(path, VERDICT, True, str(summary.get("verdict")), 0))
        if not self.command:
            return
        document = {
            "capture": str(place),
            "complete": capture.complete,
            "report": str(page) if page is not None else None,
            "triggers": [dataclasses.asdict(item) for item in capture.triggers],
            "verdict": summary and summary.get("verdict"),
            "findings": summary and summary.get("findings"),
            "summary": summary,
        }
        self._run(
            path, "exec", ["/bin/sh", "-c", self.command], self.command_ns, json.dumps(document).encode(),
            {"STALLSCOPE_CAPTURE": str(place)},
        )  # fmt: skip

    def _stallscope(self, path: Path, step: str, arguments: Sequence[str]) -> tuple[bool, bytes]:
        # not in the present folder: Python looks for modules there
        return self._run(path, step, [*_COMMAND_LINE, step, *arguments], ANALYSIS_NS, None, {}, cwd="/")

    def _run(
        self,
        path: Path,
        step: str,
        command: Sequence[str],
        limit_ns: int,
        stdin: bytes | None,
        environment: dict[str, str],
        cwd: str | None = None,
    ) -> tuple[bool, bytes]:
        """Run one child; returns whether it did well, and its output where that is wanted."""
        began_ns = time.monotonic_ns()
        wants_output = step == "summary"
        output = b""
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                # what a command prints goes to the journal with our own messages
                stdout=subprocess.PIPE if wants_output else 2,
                env={**os.environ, **environment},
                start_new_session=True,
                cwd=cwd,
            )
        except OSError as error:
            self._note(path, step, f"cannot be run: {error.strerror}", began_ns)
            return False, b""
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, child.pid, _NICENESS)
        with self._condition:
            self._child = child
            if self._is_closed:
                _kill(child)
        try:
            with suppress(BrokenPipeError):  # it need not read
                output = child.communicate(stdin, limit_ns / 1e9)[0] or b""
            status = child.wait(max(limit_ns - (time.monotonic_ns() - began_ns), 0) / 1e9)
            text = _ended(status)
        except subprocess.TimeoutExpired:
            _kill(child)
            child.communicate()
            status, text = -1, f"killed: it took more than {format_duration_ns(limit_ns)}"
        finally:
            with self._condition:
                self._child = None
        _kill(child)  # what it left behind in its session
        if status == 0 and len(output) > _MAX_DOCUMENT_BYTES:
            status, text, output = -1, "its findings are too large", b""
        self._note(path, step, text, began_ns)
        return status == 0, output

    def _note(self, path: Path, step: str, text: str, began_ns: int) -> None:
        result = AfterResult(path, step, text == "done", text, time.monotonic_ns() - began_ns)
        with self._condition:
            self._results.append(result)
            self._condition.notify_all()


def _ended(status: int) -> str:
    if status == 0:
        return "done"
    if status < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"ended with exit code {status}"


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and everything in its session's process group; nothing where all have ended."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
