"""The few system calls that attach a loaded program and read a map: bpf(2), perf_event_open(2).

bcc compiles and loads (in ``loader``); attaching is done here, without it, because it must be quick, may
be repeated for hours, and an attachment must be nothing but a file descriptor that ends with us.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import math
import mmap
import os
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stallscope.tracer.errors import SurroundingsError

# Linux arch/x86/entry/syscalls/syscall_64.tbl
_SYS_PERF_EVENT_OPEN = 298
_SYS_BPF = 321

# Linux include/uapi/linux/bpf.h, enum bpf_cmd
_MAP_LOOKUP_ELEM, _MAP_UPDATE_ELEM, _MAP_DELETE_ELEM, _MAP_GET_NEXT_KEY = 1, 2, 3, 4
_PROG_LOAD = 5
_RAW_TRACEPOINT_OPEN = 17
_LINK_CREATE = 28

# Linux include/uapi/linux/bpf.h, enum bpf_prog_type, bpf_attach_type, and the flags of uprobe_multi
_PROG_TYPE_KPROBE = 2
UPROBE_MULTI = 48
"""What a uprobe's program is loaded for, so that a link can attach it (Linux 6.6; older kernels ignore it)."""
_UPROBE_MULTI_RETURN = 1

# Linux include/uapi/linux/perf_event.h
_PERF_EVENT_IOC_ENABLE = 0x2400
_PERF_EVENT_IOC_SET_BPF = 0x40042408
_PERF_FLAG_FD_CLOEXEC = 8
_PERF_TYPE_SOFTWARE = 1
_PERF_COUNT_SW_CPU_CLOCK = 0
_STRICTEST_UPSTREAM = 2
"""Of kernel.perf_event_paranoid: Debian's and Ubuntu's kernels know more, and ask for CAP_SYS_ADMIN there."""
_PMUS = Path("/sys/bus/event_source/devices")

_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attributes: bytes) -> int:
    """Return the result of bpf(2); raises OSError."""
    buffer = ctypes.create_string_buffer(attributes, 128)
    result: int = _libc.syscall(_SYS_BPF, command, buffer, ctypes.c_uint(128))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class BpfMap:
    """A BPF map behind a file descriptor, its keys and values as numpy scalars and arrays."""

    def __init__(self, fd: int, key: np.dtype[Any], value: np.dtype[Any], values_per_key: int = 1) -> None:
        """Wrap the map ``fd``; a per-CPU map has ``values_per_key`` values (one per possible CPU)."""
        self.fd = fd
        self._key = np.zeros(1, key)
        self._next = np.zeros(1, key)
        self._value = np.zeros(values_per_key, value)

    def lookup(self, key: Any) -> npt.NDArray[Any] | None:
        """Return the key's value(s), shape (values_per_key,), a copy; None if there is none."""
        self._key[0] = key
        try:
            _bpf(_MAP_LOOKUP_ELEM, self._attributes(self._value))
        except FileNotFoundError:
            return None
        return self._value.copy()

    def update(self, key: Any, value: Any) -> None:
        """Set the key's value; raises OSError when the map is full."""
        self._key[0] = key
        self._value[0] = value
        _bpf(_MAP_UPDATE_ELEM, self._attributes(self._value))

    def delete(self, key: Any) -> None:
        """Remove the key; a key that is not there is fine."""
        self._key[0] = key
        with contextlib.suppress(FileNotFoundError):
            # the kernel refuses a request with anything beyond the key
            _bpf(_MAP_DELETE_ELEM, struct.pack("=IIQ", self.fd, 0, self._key.ctypes.data))

    def items(self, limit: int = 1 << 20) -> Iterator[tuple[Any, npt.NDArray[Any]]]:
        """Yield (key, value) pairs; entries that come or go meanwhile may be missed."""
        keys: list[Any] = []
        pointer = 0
        while len(keys) < limit:
            attributes = struct.pack("=IIQQ", self.fd, 0, pointer, self._next.ctypes.data)
            try:
                _bpf(_MAP_GET_NEXT_KEY, attributes)
            except FileNotFoundError:
                break
            keys.append(self._next[0].copy())
            self._key[0] = self._next[0]
            pointer = self._key.ctypes.data
        for key in keys:
            value = self.lookup(key)
            if value is not None:
                yield key, value

    def _attributes(self, value: npt.NDArray[Any]) -> bytes:
        return struct.pack("=IIQQQ", self.fd, 0, self._key.ctypes.data, value.ctypes.data, 0)


class MappedArray:
    """An array map made with BPF_F_MMAPABLE (Linux 5.5), read where it lies: no system call, always current."""

    def __init__(self, fd: int, value: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Map the array ``fd``.

        Args:
            value: dtype of one value, a multiple of 8 bytes.
            shape: how the values are looked at; their number is the product.

        Raises:
            OSError: the kernel refuses the mapping.
        """
        count = math.prod(shape)
        length = -(-count * value.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ)
        self.values = np.frombuffer(self._pages, value, count).reshape(shape)

    def close(self) -> None:
        """Unmap it; nobody may hold a view of its values."""
        del self.values
        self._pages.close()


def attach_uprobe(program_fd: int, path: str, offset: int, pid: int, *, is_return: bool) -> int:
    """Attach a loaded program to a place in a file, for one process (or all with pid -1); returns the handle.

    Args:
        path: the file; ``/proc/PID/exe`` also reaches one that was replaced or deleted.
        offset: bytes into the file.

    Raises:
        SurroundingsError: the kernel refuses; says why and what to do.
    """
    path_buffer = ctypes.create_string_buffer(os.fsencode(path))
    try:
        if has_uprobe_links():
            return _link_uprobe(program_fd, path_buffer, offset, max(pid, 0), is_return=is_return)
        return _attach_probe(program_fd, "uprobe", ctypes.addressof(path_buffer), offset, pid, is_return=is_return)
    except OSError as error:
        raise SurroundingsError(_why_not(error.errno or 0, path, offset, pid)) from error


@cache
def has_uprobe_links() -> bool:
    """Return whether uprobes can be attached by a link that tells processes apart.

    Perf events are detached one after another under a lock of the whole kernel (90 ms each, and nothing can be
    attached meanwhile), links side by side. The first kernels with them (6.6 to 6.9) followed one thread
    instead of its process; the mended ones refuse the pid -1, by which libbpf tells them too (Linux commit
    46ba0e49b642, v6.10).
    """
    try:
        program_fd = _load_return_0(_PROG_TYPE_KPROBE, UPROBE_MULTI)
    except OSError:
        return False
    numbers = []
    try:
        for pid in (0, -1):
            try:
                os.close(_link_uprobe(program_fd, ctypes.create_string_buffer(b"/"), 0, pid, is_return=False))
                numbers.append(0)
            except OSError as error:
                numbers.append(error.errno or 0)
    finally:
        os.close(program_fd)
    return numbers == [errno.EBADF, errno.EINVAL]  # "/" is no file that could be probed


def _link_uprobe(program_fd: int, path: ctypes.Array[ctypes.c_char], offset: int, pid: int, *, is_return: bool) -> int:
    """Attach a program to a place in a file by a link, pid 0 for all processes; raises OSError."""
    offsets = (ctypes.c_uint64 * 1)(offset)
    flags = _UPROBE_MULTI_RETURN if is_return else 0
    # union bpf_attr, link_create: prog_fd, target_fd, attach_type, flags; uprobe_multi: path, offsets,
    # ref_ctr_offsets, cookies, cnt, flags, pid
    attributes = struct.pack(
        "=IIIIQQQQIIi", program_fd, 0, UPROBE_MULTI, 0, ctypes.addressof(path), ctypes.addressof(offsets), 0, 0, 1,
        flags, pid,
    )  # fmt: skip
    return _bpf(_LINK_CREATE, attributes)


def attach_kprobe(program_fd: int, function: str, *, is_return: bool) -> int:
    """Attach a loaded program to a kernel function; returns the handle.

    Raises:
        SurroundingsError: the kernel refuses, has no kprobes, or no such function.
    """
    name_buffer = ctypes.create_string_buffer(function.encode())
    try:
        return _attach_probe(program_fd, "kprobe", ctypes.addressof(name_buffer), 0, -1, is_return=is_return)
    except OSError as error:
        raise SurroundingsError(f"cannot attach a kprobe to {function}: {error.strerror}") from error


def attach_tracing(program_fd: int, function: str) -> int:
    """Attach a loaded fentry or fexit program to the function it was loaded for; returns the handle.

    Raises:
        SurroundingsError: the kernel refuses.
    """
    try:
        return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", 0, program_fd))
    except OSError as error:
        raise SurroundingsError(f"cannot attach fentry to {function}: {error.strerror}") from error


def _attach_probe(program_fd: int, kind: str, target: int, offset: int, pid: int, *, is_return: bool) -> int:
    """Open a kprobe or uprobe perf event and attach the program; raises OSError.

    Args:
        program_fd: the program. kind: ``kprobe`` or ``uprobe``.
        target: address of the function's name or the file's path; offset: in the function or file, bytes.
        pid: process to probe, -1 for all.
        is_return: probe the return instead of the entry.
    """
    pmu, return_bit = _pmu(kind)
    # struct perf_event_attr, PERF_ATTR_SIZE_VER5: type, size, config, 3 x u64, flags, wakeup, bp_type,
    # config1 = uprobe_path or kprobe_func, config2 = probe_offset
    attributes = struct.pack("=IIQQQQQIIQQ", pmu, 112, int(is_return) << return_bit, 0, 0, 0, 0, 0, 0, target, offset)
    return _open_perf_event(program_fd, attributes, pid)


def _open_perf_event(program_fd: int, attributes: bytes, pid: int) -> int:
    """Open a perf event on a thread or process, or with -1 on all, attach the program, and enable it."""
    buffer = ctypes.create_string_buffer(attributes, 112)
    cpu = 0 if pid < 0 else -1
    handle: int = _libc.syscall(_SYS_PERF_EVENT_OPEN, buffer, pid, cpu, -1, ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC))
    if handle < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        fcntl.ioctl(handle, _PERF_EVENT_IOC_SET_BPF, program_fd)
        fcntl.ioctl(handle, _PERF_EVENT_IOC_ENABLE, 0)
    except OSError:
        os.close(handle)
        raise
    return handle


def attach_cpu_clock(program_fd: int, tid: int, period_ns: int) -> int:
    """Run a loaded perf event program each time a thread has used this much CPU; returns the handle.

    Raises:
        SurroundingsError: the kernel refuses.
    """
    # struct perf_event_attr, PERF_ATTR_SIZE_VER5: type, size, config, sample_period, 10 words that stay 0
    attributes = struct.pack("=IIQQ", _PERF_TYPE_SOFTWARE, 112, _PERF_COUNT_SW_CPU_CLOCK, period_ns)
    try:
        return _open_perf_event(program_fd, attributes, tid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise SurroundingsError(f"cannot sample thread {tid}: it is gone") from error
        needs = "it needs root or CAP_PERFMON, and the rate within /proc/sys/kernel/perf_event_max_sample_rate"
        if error.errno == errno.EACCES and _perf_paranoia() > _STRICTEST_UPSTREAM:
            needs = "under this kernel.perf_event_paranoid it needs root or CAP_SYS_ADMIN; set that to 2 with sysctl"
        raise SurroundingsError(f"cannot sample thread {tid}: {error.strerror}; {needs}") from error


def _perf_paranoia() -> int:
    try:
        return int(Path("/proc/sys/kernel/perf_event_paranoid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def attach_raw_tracepoint(program_fd: int, name: str) -> int:
    """Attach a loaded program to a raw tracepoint; returns the handle.

    Raises:
        SurroundingsError: the kernel refuses or has no such tracepoint.
    """
    name_buffer = ctypes.create_string_buffer(name.encode())
    try:
        return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", ctypes.addressof(name_buffer), program_fd))
    except OSError as error:
        raise SurroundingsError(
            f"cannot attach raw tracepoint {name}: {error.strerror}; it needs Linux 4.17 and CAP_PERFMON or root"
        ) from error


@cache
def _pmu(kind: str) -> tuple[int, int]:
    """Return the perf event type of kprobes or uprobes and the config bit that makes one a return probe."""
    folder = _PMUS / kind
    try:
        number = int((folder / "type").read_text(encoding="ascii"))
        return_bit = int((folder / "format/retprobe").read_text(encoding="ascii").strip().partition(":")[2])
    except (OSError, ValueError) as error:
        raise SurroundingsError(
            f"this kernel offers no {kind}s: {folder} is not readable; it needs CONFIG_{kind.upper()}_EVENTS"
        ) from error
    return number, return_bit


def _why_not(number: int, path: str, offset: int, pid: int) -> str:
    place = f"cannot attach a uprobe at {offset:#x} of {path} in process {pid}"
    if number in (errno.EACCES, errno.EPERM):
        if not has_uprobe_links():
            return f"{place}: not permitted; before Linux 6.10 that takes CAP_SYS_ADMIN: run as root"
        return f"{place}: not permitted; run as root or with CAP_BPF and CAP_PERFMON, and see kernel lockdown"
    if number == errno.ESRCH:
        return f"{place}: the process is gone"
    return f"{place}: {os.strerror(number)}"


def load_trial(kind: int, attach_type: int = 0, attach_btf_id: int = 0) -> str:
    """Try to load a program of two instructions (``return 0``) and free it; returns "" or the kernel's reason.

    Args:
        kind: ``enum bpf_prog_type``; attach_type: ``enum bpf_attach_type`` for tracing programs.
        attach_btf_id: BTF id of the function to trace, for tracing programs.
    """
    try:
        os.close(_load_return_0(kind, attach_type, attach_btf_id))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _load_return_0(kind: int, attach_type: int = 0, attach_btf_id: int = 0) -> int:
    """Load a program of two instructions; returns its file descriptor, raises OSError."""
    instructions = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)  # r0 = 0; exit
    code = ctypes.create_string_buffer(instructions, len(instructions))
    license_text = ctypes.create_string_buffer(b"Apache-2.0")
    attributes = struct.pack(
        "=IIQQIIQII16sIIIIQIIQIII",
        kind, 2, ctypes.addressof(code), ctypes.addressof(license_text), 0, 0, 0, 0, 0, b"trial", 0, attach_type,
        0, 0, 0, 0, 0, 0, 0, attach_btf_id, 0,
    )  # fmt: skip
    return _bpf(_PROG_LOAD, attributes)
