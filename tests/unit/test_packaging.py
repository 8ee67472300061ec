"""The systemd unit: systemd reads it, it confines, and it forbids nothing that tracing does."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGING = Path(__file__).parents[2] / "packaging"
UNIT = PACKAGING / "stallscope-watch.service"
DROP_IN = PACKAGING / "stallscope-watch.service.d" / "admin.conf"
ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed (Debian: systemd)")

MOST_EXPOSED = 3.0
"""systemd's measure from 0 to 10; above it something that confines was taken out of the unit."""

MADE_BY_TRACING = """
accept4 access arch_prctl bind bpf brk chdir clock_nanosleep clone clone3 close close_range connect dup2
epoll_create1 execve exit exit_group fcntl flock fstat fsync ftruncate futex getcwd getdents64 geteuid getpeername
getpid getppid getrandom getrusage getsockname getsockopt gettid ioctl kill listen lseek madvise mbind mkdir mmap
mprotect munmap newfstatat open openat perf_event_open pidfd_open pipe2 poll prctl pread64 prlimit64 read readlink
recvfrom recvmsg rename rseq rt_sigaction rt_sigprocmask rt_sigreturn rt_sigsuspend sched_getaffinity sendmsg sendto
set_robust_list set_tid_address setns setpgid setpriority setsid setsockopt shutdown socket socketpair sysinfo
timer_create timer_settime uname unlink uretprobe vfork wait4 write
"""
"""System calls that strace saw in ``record`` and ``watch`` on Linux 6.18 with Python 3.11, and those of older kernels'
attach, of another network namespace, of a capture's end and of the metrics."""


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return parser


def analyze(*words: str | Path) -> str:
    assert ANALYZE is not None
    done = subprocess.run([ANALYZE, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit and its drop-in as in /etc, with a program that is there."""
    text = UNIT.read_text().replace("/opt/stallscope/bin/stallscope", "/bin/true")
    path = tmp_path / UNIT.name
    path.write_text(text)
    return path


def with_drop_in(path: Path) -> None:
    folder = path.parent / f"{path.name}.d"
    folder.mkdir()
    shutil.copy(DROP_IN, folder)


@needs_systemd
@pytest.mark.parametrize("containers", [False, True])
def test_systemd_reads_every_line(installed: Path, containers: bool) -> None:
    if containers:
        with_drop_in(installed)
    assert analyze("verify", "--man=no", installed) == ""


@needs_systemd
def test_it_is_confined(installed: Path) -> None:
    text = analyze("security", "--offline=true", "--no-pager", "--threshold=100", installed)
    (level,) = re.findall(r"Overall exposure level for .*: ([0-9.]+)", text)
    assert float(level) <= MOST_EXPOSED


def expand(name: str) -> set[str]:
    """Return the system calls of one of systemd's groups."""
    words = [line.strip() for line in analyze("syscall-filter", name).splitlines()[1:]]
    names = {word for word in words if word and not word.startswith(("#", "@"))}
    return names.union(*(expand(word) for word in words if word.startswith("@")))


@needs_systemd
def test_nothing_that_tracing_does_is_forbidden() -> None:
    groups = unit()["Service"]["SystemCallFilter"].removeprefix("~").split()
    forbidden = set().union(*map(expand, groups))
    assert len(forbidden) > 50
    assert forbidden & set(MADE_BY_TRACING.split()) == set()


def test_it_has_the_capabilities_that_record_was_tested_with() -> None:
    """tests/kernel/test_capabilities.py records with these, and without each one of them."""
    service = unit()["Service"]
    wanted = {"CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_SYSLOG"}
    assert set(service["AmbientCapabilities"].split()) == set(service["CapabilityBoundingSet"].split()) == wanted
    assert DROP_IN.read_text().count("CAP_SYS_ADMIN") == 3, "in the remark, and added to both sets"


def test_the_readme_names_every_file() -> None:
    text = (PACKAGING / "README.md").read_text()
    for path in PACKAGING.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert str(path.relative_to(PACKAGING)) in text, path


@pytest.mark.parametrize("line", ["ProtectKernelTunables", "ProtectKernelLogs"])
def test_the_kernels_symbols_are_not_hidden(line: str) -> None:
    """The one hides /proc/kallsyms, the other takes CAP_SYSLOG away, without which it has no addresses."""
    assert line not in unit()["Service"]
