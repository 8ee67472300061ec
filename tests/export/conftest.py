"""Recordings and the programs that open what is exported from them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit")]

from mixed import mixed_recording  # noqa: E402
from recordings import GOLDEN  # noqa: E402

from stallscope.reports.export.formats import FORMATS  # noqa: E402
from stallscope.tracer.analysis.analysis import Analysis, analyse  # noqa: E402
from stallscope.tracer.imports.run import run_import  # noqa: E402
from stallscope.tracer.recording import read_recording  # noqa: E402


def imported_recording(path: Path) -> Path:
    """Write what other tools told of a server, as a recording of its own."""
    data = HERE.parent / "data"
    inputs = [
        data / "backlog-full.pcap",
        data / "redis-cli" / "slowlog-7.0.no-raw.txt",
        data / "redis-cli" / "info-7.0.txt",
    ]
    return run_import(inputs, None, path, (7379,)).path


RECORDINGS = {**GOLDEN, "mixed": mixed_recording, "imported": imported_recording}
CACHE = HERE.parents[1] / ".cache" / "export"


@pytest.fixture(scope="session")
def analysis_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Analysis]:
    """Return the analysis of a recording by its name."""
    folder = tmp_path_factory.mktemp("recordings")
    known: dict[str, Analysis] = {}

    def of(name: str) -> Analysis:
        if name not in known:
            known[name] = analyse(read_recording(RECORDINGS[name](folder / f"{name}.stall")))
        return known[name]

    return of


@pytest.fixture(scope="session")
def export(
    analysis_of: Callable[[str], Analysis], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Return the export of a recording in a format, by their names."""
    folder = tmp_path_factory.mktemp("exports")

    def exported(name: str, format_name: str) -> Path:
        chosen = FORMATS[format_name]
        path = folder / f"{name}{chosen.suffix}"
        if not path.exists():
            with path.open("wb") as out:
                chosen.load()(analysis_of(name), out)
        return path

    return exported


@pytest.fixture(scope="session")
def speedscope_page() -> Path:
    """Return the page of speedscope's release, installed once with npm."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed (apt-get install npm)")
    CACHE.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "package.json", CACHE)
    done = subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"],
        cwd=CACHE, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    page = CACHE / "node_modules" / "speedscope" / "dist" / "release" / "index.html"
    if done.returncode and not page.exists():
        pytest.skip(f"npm cannot install speedscope: {done.stderr.strip().splitlines()[-1:]}")
    assert page.exists()
    return page
