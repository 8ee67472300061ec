"""What the image is made of, and the digest that says whether a built one is still current."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

from .errors import MachineError

PACKAGE = Path(__file__).resolve().parent
VAGRANT = PACKAGE.parent
PROJECT = VAGRANT.parent

# Debian 12 carries both: its own kernel, and the one of Debian 13 through bookworm-security.
KERNELS = {
    "6.1": "linux-image-cloud-amd64",
    "6.12": "linux-image-6.12-cloud-amd64",
}
# busybox is the initrd's shell and powers the machine off; mount is not in a minimal Debian.
BASE_PACKAGES = ("busybox-static", "mount", *KERNELS.values())

# Files that end up in the image or decide what does, beside the list of packages.
INPUT_FILES = (
    "vagrant/requirements.txt",
    "vagrant/provision.sh",
    "vagrant/machine/guest/tree.sh",
    "vagrant/machine/guest/init",
    "vagrant/machine/guest/initrd-init",
    "vagrant/machine/image.py",
    "vagrant/machine/initrd.py",
)
# Of pyproject.toml only this decides what pip installs; the linters' tables may change freely.
PROJECT_KEYS = ("name", "version", "requires-python", "dependencies", "scripts")


def packages(project: Path = PROJECT) -> list[str]:
    """Return the Debian packages of the image, sorted, each once."""
    lines = (project / "vagrant/packages.txt").read_text().splitlines()
    named = {name for line in lines for name in line.split("#")[0].split()}
    return sorted(named | set(BASE_PACKAGES))


def digest(project: Path = PROJECT) -> str:
    """Return 16 hex digits that change when a rebuild would give another image.

    The mirrors are left out: they decide where the packages come from, not what they are. So are
    newer versions of the same packages: ``--force`` fetches those.

    Raises:
        MachineError: A file of the project is missing or pyproject.toml cannot be read.
    """
    whole = hashlib.sha256()
    try:
        for name in INPUT_FILES:
            content = (project / name).read_bytes()
            whole.update(f"{name} {len(content)}\n".encode())
            whole.update(content)
        table = _project_table(project / "pyproject.toml")
    except OSError as error:
        raise MachineError(
            f"cannot read {error.filename}: {error.strerror}; use a complete checkout of the project"
        ) from error
    lists = [packages(project), list(KERNELS), [table.get(key) for key in PROJECT_KEYS]]
    whole.update(json.dumps(lists, sort_keys=True).encode())
    return whole.hexdigest()[:16]


def _project_table(pyproject: Path) -> dict[str, object]:
    if sys.version_info >= (3, 11):
        import tomllib

        try:
            table: dict[str, object] = tomllib.loads(pyproject.read_text())["project"]
        except (tomllib.TOMLDecodeError, KeyError) as error:
            raise MachineError(f"cannot use {pyproject}: {error}; repair its [project] table") from error
        return table
    raise MachineError(f"cannot read {pyproject}: this Python has no tomllib; run vagrant/vm with Python 3.11 or newer")


def mirrors(apt: Path = Path("/etc/apt")) -> tuple[str, str]:
    """Return the Debian and the security mirror that this host's own apt uses, else the public ones."""
    files = [
        apt / "sources.list",
        *sorted(apt.glob("sources.list.d/*.list")),
        *sorted(apt.glob("sources.list.d/*.sources")),
    ]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    used = re.findall(r"^(?:URIs:|deb(?: \[[^]]*\])?)\s+(\S+)", text, re.MULTILINE)
    debian = next((uri for uri in used if re.search(r"/debian/?$", uri)), "http://deb.debian.org/debian")
    security = next(
        (uri for uri in used if re.search(r"/debian-security/?$", uri)),
        "http://deb.debian.org/debian-security",
    )
    return debian, security
