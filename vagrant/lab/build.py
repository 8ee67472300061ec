#!/usr/bin/env python3
"""Builds the Redis servers of the lab from pinned sources and prints the path of each.

Examples:
    build.py                      build all of them, but for those that only the internet has, where there is none
    build.py 2.8.17 5.0.6         build these two
    build.py --list               say what can be built, and what is built
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import http.client
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab import LabError, LabUsageError, home

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
BUILD_STEPS = 1
"""Counts changes of the steps below: part of every stamp, so that raising it rebuilds everything."""

APT_PACKAGES = {"gcc": "gcc", "make": "make", "autoconf": "autoconf", "patch": "patch"}
LIBC_HEADER = Path("/usr/include/stdio.h")
DOWNLOAD_TIMEOUT_S = 30.0


class UnreachableError(LabError):
    """A source that is only to be had from the internet, from where there is none."""


@dataclass(frozen=True)
class Source:
    """One release of Redis: its archive's file and SHA-256, Redis's folder in it, and where the archive comes from.

    Attributes:
        requirement: how pip names the sdist that holds it; url: or where Redis's own archive is.
    """

    file: str
    folder: str
    sha256: str
    requirement: str = ""
    url: str = ""

    def __post_init__(self) -> None:
        if bool(self.requirement) == bool(self.url):
            raise TypeError(f'{self.file} needs either "requirement" or "url"')


@dataclass(frozen=True)
class Build:
    """One server: where its source comes from, the words passed to make, and what is patched."""

    name: str
    about: str
    source: Source
    make: tuple[str, ...]
    base: str | None = None
    patches: tuple[str, ...] = ()

    def stamp(self) -> str:
        """Return the SHA-256 of everything the binary depends on, but for the compiler and the libc."""
        contents = {
            "steps": BUILD_STEPS,
            "machine": platform.machine(),
            "source": {name: value for name, value in asdict(self.source).items() if value},
            "make": self.make,
            "patches": {name: (HERE / "patches" / name).read_text() for name in self.patches},
        }
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def load_builds(path: Path = HERE / "builds.toml") -> dict[str, Build]:
    """Return the builds that ``builds.toml`` declares, by name, in its order.

    Raises:
        LabError: a build names a source, a base or a key that does not exist.
    """
    document: dict[str, Any] = tomllib.loads(path.read_text())
    try:
        sources = {name: Source(**fields) for name, fields in document["source"].items()}
        builds = {}
        for name, fields in document["build"].items():
            words = {key: tuple(fields[key]) for key in ("make", "patches") if key in fields}
            builds[name] = Build(**{**fields, **words, "name": name, "source": sources[fields["source"]]})
            if builds[name].base is not None:
                builds[builds[name].base]
    except (KeyError, TypeError) as error:
        raise LabError(f"cannot read {path}: {error}; compare it with the comment at its head") from None
    return builds


def server_path(name: str, prefix: Path | None = None) -> Path:
    """Return where the server of that build lies, whether or not it is built yet."""
    return (prefix or home()) / "redis" / name / "redis-server"


def is_built(build: Build, prefix: Path | None = None) -> bool:
    """Return whether the server is there and was made from the inputs as they are now."""
    server = server_path(build.name, prefix)
    stamp = server.with_name("stamp")
    return server.exists() and stamp.exists() and stamp.read_text().strip() == build.stamp()


def make_server(build: Build, builds: dict[str, Build], prefix: Path) -> Path:
    """Return the path of the server, building it (and its base) first when its inputs have changed.

    Raises:
        LabError: the source cannot be had, a tool is missing, or a step failed; the message names the log.
    """
    with _lock(prefix / "build" / f"{build.name}.lock"):
        server = server_path(build.name, prefix)
        if is_built(build, prefix):
            return server
        _require_tools(build)
        started = time.monotonic()
        tree = prefix / "build" / build.name
        log = tree.with_name(f"{build.name}.log")
        log.write_text("")
        shutil.rmtree(tree, ignore_errors=True)
        if build.base is not None:
            base_tree = _base_tree(builds[build.base], builds, prefix)
            shutil.copytree(base_tree, tree, symlinks=True)
        else:
            _unpack(build.source, fetch(build.source, prefix / "sources", log), tree)
            _prepare_jemalloc(tree / "deps" / "jemalloc", log)
        for patch in build.patches:
            _step(["patch", "-p1", "--forward", "--input", str(HERE / "patches" / patch)], tree, log)
        _note(f"{build.name}: compiling (log: {log})")
        jobs = f"-j{os.cpu_count() or 1}"
        _step(["make", jobs, *build.make, "redis-server"], tree / "src", log)
        _install(tree / "src" / "redis-server", server, build.stamp())
        _note(f"{build.name}: built in {time.monotonic() - started:.0f} s")
        return server


def _base_tree(base: Build, builds: dict[str, Build], prefix: Path) -> Path:
    """Return the compiled tree of a base build, compiling it again when only the tree is gone."""
    tree = prefix / "build" / base.name
    if not (tree / "src" / "redis-server").exists():
        server_path(base.name, prefix).with_name("stamp").unlink(missing_ok=True)
    make_server(base, builds, prefix)
    return tree


def fetch(source: Source, folder: Path, log: Path) -> Path:
    """Return the path of the verified archive, downloading it when it is not there."""
    archive = folder / source.file
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _note(f"downloading {source.requirement or source.url}")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            download = _download_sdist if source.requirement else _download_archive
            download(source, Path(scratch), log, f"or put {source.file} into {folder} by hand")
            (Path(scratch) / source.file).replace(archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise LabError(f"{archive} has SHA-256 {digest}, not the pinned {source.sha256}; delete it and try again")
    return archive


def _download_sdist(source: Source, into: Path, log: Path, remedy: str) -> None:
    """Download with pip.

    It builds an sdist's metadata even to download it, and the old setup.py files need bdist_wheel for that:
    leave build isolation on, which brings a setuptools that has it.
    """
    package = source.requirement.partition("==")[0]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    _step([*pip, "--no-binary", package, "--dest", str(into), source.requirement], into.parent, log, remedy)


def _download_archive(source: Source, into: Path, log: Path, remedy: str) -> None:
    try:
        with urllib.request.urlopen(source.url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            (into / source.file).write_bytes(response.read())
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(f"cannot download {source.url}: {error}; go online, {remedy}") from error


def _unpack(source: Source, archive: Path, tree: Path) -> None:
    """Unpack Redis's folder of the sdist into ``tree``, without the objects its packager left behind."""
    with tempfile.TemporaryDirectory(dir=tree.parent) as scratch, tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _path: member)
        inside = [member for member in tar.getmembers() if member.name.startswith(source.folder + "/")]
        tar.extractall(scratch, inside)
        (Path(scratch) / source.folder).replace(tree)
    for pattern in ("**/*.o", "**/*.a", "**/.make-*"):
        for stale in tree.glob(pattern):
            stale.unlink()
    for program in ("redis-server", "redis-sentinel", "redis-cli", "redis-benchmark"):
        (tree / "src" / program).unlink(missing_ok=True)


def _prepare_jemalloc(jemalloc: Path, log: Path) -> None:
    """Make the two files that jemalloc's releases have and the sdists lack: VERSION and configure."""
    version = jemalloc / "VERSION"
    if not version.exists():
        released = re.search(r"^\* (\d+\.\d+\.\d+)", (jemalloc / "ChangeLog").read_text(), re.MULTILINE)
        if released is None:
            raise LabError(f"cannot tell jemalloc's version from {jemalloc / 'ChangeLog'}; write {version} by hand")
        version.write_text(f"{released[1]}-0-g{'0' * 40}\n")
    if not (jemalloc / "configure").exists():
        _step(["autoconf"], jemalloc, log)


def _install(binary: Path, server: Path, stamp: str) -> None:
    """Put the binary into place in one rename: a running server keeps its old inode, and its uprobes."""
    server.parent.mkdir(parents=True, exist_ok=True)
    arriving = server.with_name("redis-server.new")
    shutil.copy2(binary, arriving)
    arriving.replace(server)
    server.with_name("stamp").write_text(stamp + "\n")


def _require_tools(build: Build) -> None:
    missing = [package for tool, package in APT_PACKAGES.items() if shutil.which(tool) is None]
    if not build.patches and "patch" in missing:
        missing.remove("patch")
    if not LIBC_HEADER.exists():
        missing.append("libc6-dev")
    if missing:
        packages = " ".join(missing)
        raise LabError(f"cannot build Redis {build.name}: missing {packages}; apt-get install {packages}")


def _step(command: Sequence[str], folder: Path, log: Path, remedy: str = "") -> None:
    """Run one command with its output in the log.

    Raises:
        LabError: it failed; the message quotes its last error and says where the log is.
    """
    with log.open("a") as output:
        output.write(f"+ cd {folder} && {' '.join(command)}\n")
        output.flush()
        done = subprocess.run(
            command, cwd=folder, env=_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    if done.returncode != 0:
        remedies = f"read {log}" + (f", {remedy}" if remedy else "")
        raise LabError(f"{Path(command[0]).name} failed in {folder}: {_last_error(log)}; {remedies}")


def _environment() -> dict[str, str]:
    """Return the environment of a build: no flags of a calling make, and no git beyond the build folder.

    Redis and jemalloc ask git for a version when they are built, and would find this project's.
    """
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CFLAGS", "CPPFLAGS", "LDFLAGS", "PREFIX")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    return {**environment, "GIT_DIR": "/nonexistent", "LC_ALL": "C"}


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|not found|No such file", line, re.IGNORECASE)]
    return (errors or lines or ["no output"])[-1][:160]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold off another ``build.py`` that wants the same build at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a build of --list; without any, all of them")
    parser.add_argument("--list", action="store_true", help="list the builds: name, built or not, what it is")
    parser.add_argument("--prefix", type=Path, default=home(), metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    prefix: Path = options.prefix.resolve()
    try:
        builds = load_builds()
        if options.list:
            for build in builds.values():
                print(f"{build.name:16} {'built' if is_built(build, prefix) else '-':6} {build.about}")
            return 0
        for name in options.names or builds:
            if name not in builds:
                raise LabUsageError(f'there is no build "{name}"; choose among {", ".join(builds)}')
            try:
                print(make_server(builds[name], builds, prefix), flush=True)
            except UnreachableError as error:
                if options.names:
                    raise
                _note(f"{name}: left out: {error}")
    except LabError as error:
        _note(f"build.py: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
