"""Builds the image: Debian 12 with what the tests need, as one ext4 file and a kernel per version.

No loop device and no mount: mke2fs fills the file from a folder. The image is built beside the old one and
put in its place at the end, so a build that fails or is interrupted leaves the old one as it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from . import inputs
from .errors import MachineError
from .initrd import build_initrd

STEP_TIMEOUT_S = 1800.0
# Sparse: it takes about a third on the disk. The rest is room for what a command writes.
IMAGE_MIB = 4096
MKFS = ("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal,^metadata_csum")
MKFS_EXTENDED = ("-E", "lazy_itable_init=0,root_owner=0:0")

PROVISIONING = ("vagrant/provision.sh", "vagrant/packages.txt", "vagrant/requirements.txt")

TOOLS = {"mke2fs": "e2fsprogs", "chroot": "coreutils", "unshare": "util-linux"}
# Where pip downloads through in the tree, as on the host. The values may name files: see _host_network.
NETWORK_VARIABLES = ("PIP_", "SSL_CERT_", "http_", "https_", "no_proxy", "HTTP_", "HTTPS_", "NO_PROXY")
NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf")

Note = Callable[[str], None]


def is_current(store: Path) -> bool:
    """Return whether the store holds an image made of just these inputs."""
    stamp = store / "image/inputs"
    return stamp.is_file() and stamp.read_text().strip() == inputs.digest()


def kernel_folder(store: Path, kernel: str) -> Path:
    """Return the folder with vmlinuz and initrd.img of a built image's kernel, such as "6.1"."""
    return store / "image" / f"linux-{kernel}"


def root_image(store: Path) -> Path:
    """Return the path of the root disk in a store."""
    return store / "image/root.img"


def build(store: Path, note: Note, *, force: bool = False) -> bool:
    """Build the image in a store unless it is there and current.

    Args:
        store: Folder for the image and build.log; made when it is missing.
        note: Receives progress, a line each.
        force: Build even when nothing changed, for newer packages.

    Returns:
        Whether anything was built.

    Raises:
        MachineError: A tool or a right is missing, or a step failed.
    """
    if not force and is_current(store):
        note(f"{store}/image is up to date")
        return False
    _check_host()
    store.mkdir(parents=True, exist_ok=True)
    with _locked(store, note):
        if not force and is_current(store):  # built by another while we waited
            return False
        started = time.monotonic()

        def progress(what: str) -> None:
            note(f"{time.monotonic() - started:4.0f} s  {what}")

        for leftover in store.glob("build.[0-9]*"):
            remove_tree(leftover)
        work = store / f"build.{os.getpid()}"
        work.mkdir()
        try:
            _build(work, store / "build.log", progress)
            with contextlib.suppress(FileNotFoundError):
                (store / "image").rename(work / "old")
            (work / "image").rename(store / "image")
        finally:
            remove_tree(work)
        megabytes = root_image(store).stat().st_blocks * 512 // 1_000_000
        progress(f"{store}/image is ready, {megabytes} MB")
        return True


def remove_tree(folder: Path) -> None:
    """Remove a tree, and first what a build that was killed left mounted in it: /proc, /sys, /dev.

    Raises:
        MachineError: something stays mounted; nothing is removed then.
    """
    for place in _mounted_below(folder):
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)
    left = _mounted_below(folder)
    if left:
        raise MachineError(f"{left[0]} is mounted and cannot be unmounted; run: umount {left[0]}")
    shutil.rmtree(folder, ignore_errors=True)


def _mounted_below(folder: Path) -> list[str]:
    """Return where something is mounted in a folder, innermost first."""
    above = f"{folder.resolve()}/"
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    places = [line.split(" ")[1].replace("\\040", " ") for line in lines]
    return sorted((place for place in places if place.startswith(above)), key=len, reverse=True)


def _build(work: Path, log: Path, progress: Note) -> None:
    tree, image = work / "tree", work / "image"
    image.mkdir()
    (image / "inputs").write_text(f"{inputs.digest()}\n")
    log.write_bytes(b"")
    make_tree = str(inputs.PACKAGE / "guest/tree.sh")
    _step("the root tree", [make_tree, str(tree), *inputs.mirrors(), *inputs.packages()], log)
    progress("root tree ready")
    _provision(tree, log)
    progress("project's dependencies installed")
    shutil.copy(inputs.PACKAGE / "guest/init", tree / "sbin/stallscope-init")
    for kernel in inputs.KERNELS:
        _take_kernel(tree, kernel, image / f"linux-{kernel}")
    root = image / "root.img"
    with root.open("wb") as file:
        file.truncate(IMAGE_MIB << 20)
    _step("the root disk", [*MKFS, *MKFS_EXTENDED, "-d", str(tree), str(root)], log)


def _provision(tree: Path, log: Path) -> None:
    """Run in the tree what Vagrant runs in its machine, on a copy of what pip needs to see."""
    project = tree / "vagrant"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", "tracer", "reports", "probes"):
        shutil.copytree(inputs.PROJECT / folder, project / folder, symlinks=True, ignore=ignore)
    (project / "vagrant").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *PROVISIONING):
        shutil.copy(inputs.PROJECT / name, project / name)
    variables = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "STALLSCOPE_IMAGE": "1",
    }
    with _host_network(tree) as network:
        script = "/vagrant/vagrant/provision.sh"
        _step("provisioning", ["chroot", str(tree), "bash", script], log, {**variables, **network})
    shutil.rmtree(project)
    for package in ("numpy", "pandas", "pyarrow"):  # their own tests: 60 MB
        for tests in tree.glob(f"opt/stallscope/lib/python3*/site-packages/{package}/**/tests/"):
            shutil.rmtree(tests, ignore_errors=True)


def _take_kernel(tree: Path, kernel: str, folder: Path) -> None:
    """Copy a kernel out of the tree and write its initrd."""
    modules = next((tree / "lib/modules").glob(f"{kernel}.*"), None)
    if modules is None:
        raise MachineError(f"no Linux {kernel} in the root tree; check {inputs.KERNELS[kernel]} on the mirror")
    folder.mkdir()
    shutil.copy(tree / "boot" / f"vmlinuz-{modules.name}", folder / "vmlinuz")
    guest = inputs.PACKAGE / "guest"
    (folder / "initrd.img").write_bytes(build_initrd(tree / "bin/busybox", guest / "initrd-init", modules))


def _check_host() -> None:
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if shutil.which("mmdebstrap") is None and shutil.which("debootstrap") is None:
        missing.add("mmdebstrap")
    if missing:
        raise MachineError(f"cannot build the image: missing tools; apt-get install {' '.join(sorted(missing))}")
    if os.geteuid() != 0:
        raise MachineError("cannot build the image as an ordinary user: chroot needs root; run sudo make vm")


def _step(what: str, argv: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run one command with its output in the log; end all it started when it fails or is interrupted."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(STEP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise MachineError(f"{what} took longer than {STEP_TIMEOUT_S:.0f} s; see {log}") from None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status:
        said = log.read_text(errors="replace").strip().splitlines()
        raise MachineError(f"{what} failed: {said[-1] if said else f'status {status}'}; see {log}")


@contextlib.contextmanager
def _host_network(tree: Path) -> Iterator[dict[str, str]]:
    """Lend the tree the host's name resolution, proxies and certificates; yields the variables to set."""
    variables = {name: value for name, value in os.environ.items() if name.startswith(NETWORK_VARIABLES)}
    lent = [*NETWORK_FILES, *(value for value in variables.values() if value.startswith("/"))]
    before: dict[Path, bytes | None] = {}
    for name in lent:
        source, target = Path(name), tree / name.lstrip("/")
        if source.is_file() and target not in before:
            before[target] = target.read_bytes() if target.is_file() else None
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            shutil.copyfile(source, target)
    try:
        yield variables
    finally:
        for target, content in before.items():
            target.unlink() if content is None else target.write_bytes(content)


@contextlib.contextmanager
def _locked(store: Path, note: Note) -> Iterator[None]:
    """Let one builder at a time into a store; a second one waits for the first."""
    with (store / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"waiting for another build in {store}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
