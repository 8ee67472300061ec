"""Records what is not recorded yet: one server, one load and one ``stallscope record`` at a time."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from case import PROJECT, CaseError
from case.steps import Variant

INCIDENT = PROJECT / "vagrant" / "lab" / "incident.py"
MACHINE = PROJECT / "vagrant" / "vm"
LEFT = "$STALLSCOPE_OUT"
"""In the test machine: the folder that comes back."""

ATTEMPTS = 3
"""On a busy machine the recorder may not have attached in time: such a run counts for nothing, and is done again."""

Note = Callable[[str], None]


def home() -> Path:
    """Return the folder of the recordings: ``STALLSCOPE_CASE``, or ``.case`` in the project."""
    configured = os.environ.get("STALLSCOPE_CASE")
    return Path(configured).expanduser().resolve() if configured else PROJECT / ".case"


def stallscope() -> str:
    """Return the command under test: the one of this Python's environment, or of PATH.

    Raises:
        CaseError: there is none.
    """
    beside = Path(sys.executable).with_name("stallscope")
    found = str(beside) if beside.exists() else shutil.which("stallscope")
    if found is None:
        raise CaseError("stallscope is not installed; run make setup, or pip install -e .")
    return found


@dataclass(frozen=True)
class Run:
    """One recording of a variant: where its files are, and how it was made.

    Attributes:
        number: from 1; folder: of the variant.
    """

    variant: Variant
    number: int
    folder: Path

    @property
    def recording(self) -> Path:
        """The recording."""
        return self.folder / f"{self.number}.stall"

    @property
    def load(self) -> Path:
        """What the clients met, as ``incident.py --load-json`` wrote it."""
        return self.folder / f"{self.number}.load.json"

    @property
    def summary(self) -> Path:
        """What ``stallscope summary --json`` says of it."""
        return self.folder / f"{self.number}.summary.json"

    @property
    def made(self) -> Path:
        """How and when it was made; written last, so that it stands for a complete run."""
        return self.folder / f"{self.number}.made.json"

    @property
    def is_made(self) -> bool:
        """Whether the recording is there and was made by the command as it is now."""
        if not all(path.exists() for path in (self.made, self.recording, self.load)):
            return False
        command: str = json.loads(self.made.read_text())["command"]
        return command == command_shown(self.variant)


@dataclass(frozen=True)
class Made:
    """How one recording was made.

    Attributes:
        command: as one would type it, with the files named after the variant.
        started: UTC; load_average: of this machine over the minute before; cpus: it has; niceness: of all of it.
        said: the last lines that the lab and the recorder said.
    """

    command: str
    started: str
    load_average: float
    cpus: int
    said: str
    niceness: int


def runs_of(variant: Variant, folder: Path, runs: int | None = None) -> list[Run]:
    """Return the runs of a variant in a folder of recordings, made or not."""
    return [Run(variant, number, folder / variant.name) for number in range(1, (runs or variant.runs) + 1)]


def record_missing(variants: Iterable[Variant], folder: Path, note: Note, runs: int | None = None) -> None:
    """Make the recordings that are not there yet, round by round, so that a change of weather meets all variants.

    Raises:
        CaseError: a run failed; what is recorded stays, and is not done again.
    """
    missing = [run for run in _by_rounds([runs_of(one, folder, runs) for one in variants]) if not run.is_made]
    for count, run in enumerate(missing, 1):
        note(f"recording {run.variant.name}, run {run.number} ({count} of {len(missing)})")
        run.folder.mkdir(parents=True, exist_ok=True)
        for left in reversed(range(ATTEMPTS)):
            try:
                _record(run)
                break
            except CaseError as error:
                if not left:
                    raise
                note(f"once more: {error}")


def _by_rounds(groups: list[list[Run]]) -> Iterator[Run]:
    for number in range(max(map(len, groups), default=0)):
        yield from (group[number] for group in groups if number < len(group))


def command_shown(variant: Variant) -> str:
    """Return the command of a variant's run as one would type it, from the project's folder."""
    name = LEFT + "/" + variant.name if variant.kernel else variant.name
    inner = _incident_words(variant, "vagrant/lab/incident.py", "stallscope", f"{name}.stall", f"{name}.load.json")
    return _in_machine(variant, "vagrant/vm", ".", inner) if variant.kernel else inner


def _incident_words(variant: Variant, incident: str, tracer: str, recording: str, load: str) -> str:
    record = " ".join([tracer, "record", "-p", "{pid}", *variant.record, "-o", recording])
    if variant.first:
        record = f'bash -c "{variant.first} && exec {record}"'
    # $STALLSCOPE_OUT stays for the shell of the machine, {pid} for incident.py
    return " ".join([incident, *variant.load_words(), "--interrupt", "--load-json", load, "--", record])


def _in_machine(variant: Variant, machine: str, out: str, inner: str) -> str:
    return f"{machine} run --kernel {variant.kernel} --out {shlex.quote(out)} -- '{inner}'"


def _record(run: Run) -> None:
    variant = run.variant
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=run.folder) as name:
        made = Path(name) / "1"
        left = f"{LEFT}/1" if variant.kernel else str(made)
        files = (f"{left}.stall", f"{left}.load.json")
        if variant.kernel:
            inner = _incident_words(variant, "python vagrant/lab/incident.py", "stallscope", *files)
            command = f"{sys.executable} {_in_machine(variant, str(MACHINE), name, inner)}"
        else:
            # {pid} and paths without blanks: what is typed is what is run
            command = f"{sys.executable} {_incident_words(variant, str(INCIDENT), stallscope(), *files)}"
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        load_average, niceness = os.getloadavg()[0], os.getpriority(os.PRIO_PROCESS, 0)
        status, said = _run(command)
        if status != 0:
            last = " | ".join(said.splitlines()[-3:]) or "it said nothing"
            raise CaseError(f"{variant.name}, run {run.number}, ended with status {status}: {last}")
        made.with_suffix(".stall").replace(run.recording)
        made.with_suffix(".load.json").replace(run.load)
    how = Made(command_shown(variant), started, round(load_average, 2), os.cpu_count() or 1, said, niceness)
    run.made.write_text(json.dumps(asdict(how), indent=1) + "\n")
    summarise(run)


def _run(command: str) -> tuple[int, str]:
    """Return the exit status and the last lines of a shell's command; whatever happens, it is gone then."""
    with tempfile.TemporaryFile() as output:
        words = ["bash", "-c", f"exec {command}"]
        process = subprocess.Popen(words, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    return status, "\n".join(lines[-8:])


def summarise(run: Run) -> dict[str, Any]:
    """Return what ``stallscope summary --json`` says of a recording; asked once, and kept beside it.

    Raises:
        CaseError: it cannot be read, or the tracer had not attached when the trims could begin.
    """
    if not run.summary.exists() or run.summary.stat().st_mtime < run.recording.stat().st_mtime:
        run.summary.write_text(ask("summary", str(run.recording), "--json"))
    summary: dict[str, Any] = json.loads(run.summary.read_text())
    load = json.loads(run.load.read_text())
    attached_s = (summary["targets"][0]["start_ns"] - load["started_ns"]) / 1e9
    if attached_s > load["recipe"]["attach_s"]:
        for path in (run.made, run.recording, run.load, run.summary):
            path.unlink()
        raise CaseError(
            f"{run.variant.name}, run {run.number}: the probes were attached {attached_s:.1f} s after the load's "
            f"start, too late; run again where less goes on, or raise attach in steps.toml"
        )
    return summary


def ask(*words: str, accepted: tuple[int, ...] = (0,)) -> str:
    """Return what ``stallscope`` with these words writes to stdout.

    Raises:
        CaseError: its exit code is not one of those accepted; the message is its own.
    """
    done = subprocess.run([stallscope(), *words], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode not in accepted:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CaseError(f"stallscope {words[0]} ended with {done.returncode}: {said}")
    return done.stdout
