"""What tracing really needs: with just these capabilities it works, without one of them it says which."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from lab import LabError
from lab.server import Server, find_server, running_server
from tracing import STALLSCOPE, require_tracing
from watch_process import iterations, watching

from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.capture.bpf import has_uprobe_links
from stallscope.tracer.recording import read_recording

ENOUGH = ("bpf", "perfmon", "sys_ptrace")
UNIT = Path(__file__).parents[2] / "packaging/stallscope-watch.service"
NOBODY = 65534


def with_capabilities(*names: str) -> list[str]:
    """Return what runs a command as uid 0 that has no more than these capabilities."""
    kept = ",".join(["-all", *(f"+{name}" for name in names)])
    return ["setpriv", f"--bounding-set={kept}", "--inh-caps=-all"]


def as_the_unit() -> list[str]:
    """Return what runs a command as a user who is not root, with the capabilities that the unit gives it."""
    (given,) = re.findall(r"^AmbientCapabilities=(.*)$", UNIT.read_text(), re.MULTILINE)
    kept = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in given.split())])
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
    return ["setpriv", *user, f"--inh-caps={kept}", f"--ambient-caps={kept}", f"--bounding-set={kept}"]


@pytest.fixture(scope="module", autouse=True)
def _commands() -> None:
    if shutil.which("setpriv") is None or shutil.which("unshare") is None:
        pytest.skip("requires setpriv and unshare: apt-get install util-linux")


@pytest.fixture(scope="module")
def binary() -> Path:
    require_tracing()
    for name in ("5.0.6", "2.8.17"):
        try:
            return find_server(name)
        except LabError as error:
            reason = str(error)
    pytest.skip(reason)


@pytest.fixture
def _uprobe_links() -> None:
    if not has_uprobe_links():
        pytest.skip("requires uprobe links (Linux 6.10); before them uprobes take CAP_SYS_ADMIN")


@pytest.fixture(scope="module")
def server(binary: Path) -> Iterator[Server]:
    """A server with all of our capabilities: who has fewer may not look into it, be it the same user."""
    with running_server(binary) as running:
        yield running


def record(server: Server, path: Path, prefix: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [*prefix, str(STALLSCOPE), "record", "-p", str(server.pid), "-d", "1s", "-q", "-o", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.usefixtures("_uprobe_links")
def test_these_are_enough(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "some.stall"
    done = record(server, path, with_capabilities(*ENOUGH))
    assert done.returncode == 0, done.stderr
    few = read_recording(path)
    whole = tmp_path / "all.stall"
    assert record(server, whole, []).returncode == 0
    everything = read_recording(whole)
    assert few.complete
    assert few.counters is not None
    assert sum(item.hits for item in few.counters.by_probe.values()) > 0
    for part in ("functions", "event loop", "accept queue"):
        assert few.manifest.rungs[part] == everything.manifest.rungs[part], "on the same rung as with all of them"
    assert len(few.manifest.listeners) == len(everything.manifest.listeners)


@pytest.mark.usefixtures("_uprobe_links")
@pytest.mark.parametrize("missing", ENOUGH)
def test_without_one_it_is_named(server: Server, tmp_path: Path, missing: str) -> None:
    path = tmp_path / "none.stall"
    done = record(server, path, with_capabilities(*(set(ENOUGH) - {missing})))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 4, line
    assert f"CAP_{missing.upper()}" in line
    assert not path.exists()


@pytest.mark.usefixtures("_uprobe_links")
def test_another_network_namespace_takes_one_more(server: Server, tmp_path: Path) -> None:
    """The recorder is in a network namespace of its own, so that the server is in another."""
    path = tmp_path / "other.stall"
    outside = ["unshare", "--net"]
    done = record(server, path, [*outside, *with_capabilities(*ENOUGH)])
    (line,) = done.stderr.splitlines()
    assert done.returncode == 4, line
    assert "cannot enter the network namespace" in line
    assert "CAP_SYS_ADMIN" in line
    done = record(server, path, [*outside, *with_capabilities(*ENOUGH, "sys_admin")])
    assert done.returncode == 0, done.stderr
    assert len(read_recording(path).manifest.listeners) == 1


def test_before_uprobe_links_it_says_what_it_takes(server: Server, tmp_path: Path) -> None:
    if has_uprobe_links():
        pytest.skip("requires a kernel before Linux 6.10, without uprobe links")
    done = record(server, tmp_path / "none.stall", with_capabilities(*ENOUGH))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 4, line
    assert "CAP_SYS_ADMIN" in line
    done = record(server, tmp_path / "some.stall", with_capabilities("sys_admin", "sys_ptrace"))
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("_uprobe_links")
def test_a_watch_that_is_not_root_reads_its_configuration_and_captures(server: Server, tmp_path: Path) -> None:
    folder, config = tmp_path / "captures", tmp_path / "watch.toml"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    config.write_text(f'pid = [{server.pid}]\ntrigger = ["stall>50ms"]\nbefore = "1s"\nafter = "1s"\n')
    config.chmod(0o640)
    with watching(folder, "--config", str(config), prefix=as_the_unit()) as watch:
        assert f"Uid:\t{NOBODY}" in Path(f"/proc/{watch.pid}/status").read_text()
        server.command("DEBUG", "SLEEP", "0.4")
        rows = watch.capture(0)
        assert rows.recording.complete
        # of a sleep of 400 ms; on a busy machine its start may be known only to a look that came late
        assert len(iterations(rows, 300_000_000)) == 1
        watch.wait_until_it_says("Redis was blocked for ")
        assert "cannot" not in watch.said
        assert "not readable" not in watch.said
        assert "debugCommand" in analyse(rows.recording).samples.told.values()
