"""The folder of captures: names, the disk bound, oldest first, and what an earlier run left behind.

A capture is written under a hidden name and gets its own when it is whole and on the disk; one that was cut short
says so in its name. Captures are numbered, and "oldest" means the lowest number: the wall clock may jump. Files of
other names are never touched and never counted.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from stallscope.tracer.errors import RecordingError, StallscopeError, UsageError
from stallscope.tracer.recording import SUFFIX, read_recording

CUT_SHORT = ".cut-short"
_NAME = re.compile(r"capture-(?P<number>[0-9]{6,})-(?P<time>[0-9TZ]+)(?P<cut>\.cut-short)?\.(?:stall|html|json|txt)")
_PART = re.compile(r"\.(?P<name>capture-[0-9]{6,}-[0-9TZ]+)\.stall\.part")
_LOCK = ".stallscope-watch.lock"


@dataclass(frozen=True)
class Kept:
    """One capture in the folder, with what was made of it.

    Attributes:
        number: its place in the order; path: the recording; size_bytes: of all its files.
    """

    number: int
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class Place:
    """Where one capture is written, and the name it gets at the end."""

    number: int
    temporary: Path
    final: Path


class CaptureFolder:
    """Captures of one ``stallscope watch``; may be used from several threads.

    Attributes:
        recovered: what an earlier run that was killed had left, one line each.
        removed: how many captures were removed to make room.
    """

    def __init__(self, path: Path, max_captures: int, max_bytes: int) -> None:
        """Take the folder, make it if needed, and put leftovers in order.

        Args:
            max_captures: captures to keep; max_bytes: and how large they may be together.

        Raises:
            UsageError: it cannot be made or written, or another watch has it.
        """
        self.path = path
        self.max_captures = max_captures
        self.max_bytes = max_bytes
        self.removed = 0
        self.recovered: list[str] = []
        self._mutex = threading.Lock()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"cannot write captures to {path}: {error.strerror}; choose a folder with -o") from error
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_fd)
            raise UsageError(f"another stallscope watch writes to {path}; choose another folder with -o") from error
        self._recover()
        self._last = max((kept.number for kept in self.kept()), default=0)

    def close(self) -> None:
        """Give the folder back."""
        with suppress(OSError):
            os.close(self._lock_fd)

    def kept(self) -> list[Kept]:
        """Return the captures there are, oldest first; none where the folder cannot be read."""
        sizes: dict[int, int] = {}
        paths: dict[int, Path] = {}
        for match, entry in self._entries(_NAME):
            number = int(match["number"])
            with suppress(OSError):
                sizes[number] = sizes.get(number, 0) + entry.stat().st_size
                if entry.suffix == SUFFIX or number not in paths:
                    paths[number] = entry
        return [Kept(number, paths[number], sizes[number]) for number in sorted(paths)]

    def new_place(self, wall_ns: int) -> Place:
        """Return where the next capture goes.

        Args:
            wall_ns: the time of its first trigger, ns since 1970; only for its name.
        """
        with self._mutex:
            self._last += 1
            try:
                time = datetime.fromtimestamp(wall_ns // 1_000_000_000, timezone.utc).strftime("%Y%m%dT%H%M%SZ")
            except (OverflowError, ValueError, OSError):
                time = "Z"
            name = f"capture-{self._last:06d}-{time}{SUFFIX}"
            return Place(self._last, self.path / f".{name}.part", self.path / name)

    def make_room(self, place: Place, size_bytes: int) -> bool:
        """Remove the oldest captures until one of this size fits beside the rest; returns whether it does."""
        with self._mutex:
            others = [kept for kept in self.kept() if kept.number != place.number]
            total = sum(kept.size_bytes for kept in others) + size_bytes
            while others and (total > self.max_bytes or len(others) >= self.max_captures):
                oldest = others.pop(0)
                self._remove(oldest.number)
                total -= oldest.size_bytes
            return total <= self.max_bytes

    def publish(self, place: Place) -> Path:
        """Give a finished capture its name, once it is on the disk; returns it.

        Raises:
            StallscopeError: the disk or the folder refuses.
        """
        return self._name(place.temporary, place.final)

    def publish_cut_short(self, place: Place) -> Path | None:
        """Keep what was written of a capture that could not be finished, under a name that says so.

        Returns:
            The name, or None where nothing readable was written: then nothing is left.
        """
        return self._rescue(place.temporary, place.final)[0]

    def discard(self, place: Place) -> None:
        """Remove what was written of a capture."""
        with suppress(OSError):
            place.temporary.unlink()

    def _recover(self) -> None:
        for match, entry in list(self._entries(_PART)):
            final = self.path / f"{match['name']}{SUFFIX}"
            kept, what = self._rescue(entry, final)
            self.recovered.append(f"{kept.name if kept else final.name}: {what}")

    def _rescue(self, temporary: Path, final: Path) -> tuple[Path | None, str]:
        try:
            recording = read_recording(temporary)
            rows, complete = recording.table.num_rows, recording.complete
        except RecordingError:
            rows, complete = 0, False
        if not rows:
            with suppress(OSError):
                temporary.unlink()
            return None, "was begun and held nothing; it was removed"
        try:
            if complete:
                return self._name(temporary, final), "was complete, and has its name now"
            # a rename needs no room on a full disk
            return self._name(temporary, final.with_suffix(f"{CUT_SHORT}{SUFFIX}")), "was cut short and is kept so"
        except StallscopeError as error:
            return None, str(error)

    def _name(self, temporary: Path, final: Path) -> Path:
        try:
            for path, flags in ((temporary, os.O_RDONLY), (self.path, os.O_RDONLY | os.O_DIRECTORY)):
                descriptor = os.open(path, flags | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                    if path == temporary:
                        temporary.rename(final)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise StallscopeError(f"cannot keep {final}: {error.strerror}") from error
        return final

    def _remove(self, number: int) -> None:
        names = [entry for match, entry in self._entries(_NAME) if int(match["number"]) == number]
        for entry in names:
            with suppress(OSError):
                entry.unlink()
        self.removed += 1

    def _entries(self, form: re.Pattern[str]) -> list[tuple[re.Match[str], Path]]:
        try:
            names = sorted(os.listdir(self.path))
        except OSError:
            return []
        return [(match, self.path / name) for name in names if (match := form.fullmatch(name))]
