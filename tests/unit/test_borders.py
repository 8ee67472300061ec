"""The borders of ARCHITECTURE.md, enforced on every import statement of the project."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("tracer", "reports", "probes") for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(name: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for imported in imports(path)
        if imported == name or imported.startswith(f"{name}.")
    }


def test_there_is_something_to_walk() -> None:
    assert len(SOURCES) > 20
    assert "tracer/capture/recorder.py" in importers("numpy")


def test_only_capture_imports_bcc() -> None:
    assert all(place.startswith("tracer/capture/") for place in importers("bcc"))


def test_only_reports_import_plotly() -> None:
    assert all(place.startswith("reports/") for place in importers("plotly"))


@pytest.mark.parametrize("forbidden", ["stallscope.tracer.capture", "rich", "click", "bcc"])
def test_analysis_is_pure(forbidden: str) -> None:
    assert not {place for place in importers(forbidden) if place.startswith("tracer/analysis/")}


@pytest.mark.parametrize("forbidden", ["stallscope.tracer.capture", "pandas", "rich", "click", "bcc"])
def test_the_live_window_is_pure_and_thin(forbidden: str) -> None:
    assert not {place for place in importers(forbidden) if place.startswith("tracer/live/")}
    assert not {place for place in importers(forbidden) if place == "tracer/analysis/containment.py"}
    assert {"tracer/live/stalls.py"} <= importers("stallscope.tracer.analysis.containment")


@pytest.mark.parametrize("forbidden", ["stallscope.tracer.capture", "stallscope.tracer.analysis", "pandas", "click"])
def test_reading_other_tools_needs_neither_capture_nor_analysis(forbidden: str) -> None:
    assert not {place for place in importers(forbidden) if place.startswith("tracer/imports/")}


@pytest.mark.parametrize("forbidden", ["stallscope.tracer.analysis", "stallscope.reports", "pandas", "click", "psutil"])
def test_unwinding_is_pure(forbidden: str) -> None:
    assert not {place for place in importers(forbidden) if place.startswith("tracer/unwind/")}


def test_unwinding_takes_files_alone_from_capture() -> None:
    """ELF files and their symbols are read in one place; nothing live is."""
    taken = {
        (path.name, ".".join(name.split(".")[:4]))
        for path in SOURCES
        if path.is_relative_to(ROOT / "tracer" / "unwind")
        for name in imports(path)
        if name.startswith("stallscope.tracer.capture")
    }
    files = {f"stallscope.tracer.capture.{module}" for module in ("binary", "elf", "symbol_table")}
    assert {module for _, module in taken} <= files
    assert {place for place, _ in taken} <= {"cfi.py", "code.py", "stubs.py"}


@pytest.mark.parametrize(
    "forbidden", ["bcc", "pandas", "click", "stallscope.tracer.analysis", "stallscope.tracer.capture"]
)
def test_watching_is_thin(forbidden: str) -> None:
    """It runs beside production servers for weeks; what is said about a capture is said by a child process."""
    assert not {place for place in importers(forbidden) if place.startswith("tracer/watch/")}


def test_nothing_imports_the_command_line() -> None:
    assert importers("stallscope.tracer.cli") == set()
    commands = importers("stallscope.tracer.commands")
    assert all(place == "tracer/cli.py" or place.startswith("tracer/commands/") for place in commands)


def test_analysis_does_not_print() -> None:
    for path in (ROOT / "tracer" / "analysis").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], path


def test_recorder_does_not_load_pandas() -> None:
    """What runs beside a production server stays thin."""
    for path in SOURCES:
        if path.is_relative_to(ROOT / "tracer" / "capture"):
            assert "pandas" not in {name.partition(".")[0] for name in imports(path)}, path
