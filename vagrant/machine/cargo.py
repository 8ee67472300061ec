"""What goes into the machine and comes back: two tars, each written straight onto a disk."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import MachineError

LEFT_OUT = frozenset(
    {
        ".case", ".git", ".venv", ".vm", ".vagrant", ".cache", ".hypothesis", ".mypy_cache", ".pytest_cache",
        ".ruff_cache", "__pycache__", "build", "dist", "node_modules",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Returned:
    """What a machine brought back.

    Attributes:
        exit_code: The command's own, or 124 when the machine ended it for taking too long.
        files: How many files were written to the folder asked for.
        complete: False when the files did not fit on the disk of results.
    """

    exit_code: int
    files: int
    complete: bool


def goes_in(relative: str, is_folder: bool) -> bool:
    """Return whether a file or folder of the project, by its path in it, goes into the machine.

    Of the lab's folder only the built servers do (.lab/redis/NAME/FILE): its sources and downloads
    are large, and nothing in the machine builds them.
    """
    parts = relative.split("/")
    if parts[-1] in LEFT_OUT or parts[-1].endswith(".egg-info"):
        return False
    if parts[0] != ".lab":
        return True
    depth = len(parts)
    return parts[:2] in ([".lab"], [".lab", "redis"]) and (depth <= 3 if is_folder else depth == 4)


def pack(disk: BinaryIO, project: Path, command: str, time_limit_s: int) -> None:
    """Write the tar that the machine unpacks at its root: the project, the command, its time limit.

    Raises:
        MachineError: A file of the project cannot be read.
    """

    def own(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        return entry

    with tarfile.open(fileobj=disk, mode="w") as tar:
        try:
            for folder, folders, files in os.walk(project):
                relative = Path(folder).relative_to(project)
                kept = [name for name in sorted(folders) if goes_in((relative / name).as_posix(), True)]
                folders[:] = kept  # os.walk does not enter links to folders: they stay links
                named = [name for name in sorted(files) if goes_in((relative / name).as_posix(), False)]
                for name in [*kept, *named]:
                    _add(tar, Path(folder, name), f"vagrant/{(relative / name).as_posix()}", own)
        except OSError as error:
            raise MachineError(
                f"cannot pack {error.filename}: {error.strerror}; make it readable or run as its owner"
            ) from error
        for name, text in (("job", f"{command}\n"), ("time-limit", f"{time_limit_s}\n")):
            entry = tarfile.TarInfo(f"run/stallscope/{name}")
            entry.size = len(text.encode())
            tar.addfile(own(entry), io.BytesIO(text.encode()))


def unpack(disk: Path, out: Path | None) -> Returned | None:
    """Read the tar a machine left behind, and write its files below `out`.

    Only folders and regular files are written, and none outside `out`.

    Returns:
        None when the machine wrote no tar: it never got to the end of its command.
    """
    code: int | None = None
    files = 0
    try:
        # "r:" because the rest of the disk is zeros, which the compression guess of "r" stumbles over
        with tarfile.open(disk, mode="r:") as tar:
            for entry in tar:
                content = tar.extractfile(entry) if entry.isreg() else None
                if entry.name == "exit-code" and content:
                    code = int(content.read())
                elif content and out and entry.name.startswith("out/"):
                    target = (out / entry.name[len("out/") :]).resolve()
                    if not target.is_relative_to(out.resolve()):
                        continue
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        file.write(content.read())
                    files += 1
    except (tarfile.TarError, EOFError, ValueError):
        return None if code is None else Returned(code, files, complete=False)
    return None if code is None else Returned(code, files, complete=True)


def _add(tar: tarfile.TarFile, path: Path, name: str, own: object) -> None:
    # Other work goes on in the project meanwhile: a file may vanish between listing and reading.
    try:
        tar.add(path, name, recursive=False, filter=own)  # type: ignore[arg-type]
    except FileNotFoundError:
        return
