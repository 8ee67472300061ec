"""qemu's argument list, and whether this host's KVM really runs a CPU."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .errors import MachineError

QEMU = "qemu-system-x86_64"

# The quickest kernel under emulation: nothing here guards secrets, and the emulated TSC is steady.
# transparent_hugepage: with huge pages the copy that stalls Redis is five times shorter.
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable nowatchdog net.ifnames=0 transparent_hugepage=never"
)

# mov dx, 0xf4; mov al, 0x10; out dx, al; hlt: tells the isa-debug-exit device to end qemu
BOOT_SECTOR = bytes.fromhex("ba f4 00 b0 10 ee f4 eb fd").ljust(510, b"\0") + b"\x55\xaa"
BOOT_SECTOR_STATUS = 0x10 << 1 | 1
KVM_PROBE_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Machine:
    """One virtual machine, as its user may choose it.

    Attributes:
        kernel: Folder with vmlinuz and initrd.img.
        root: The ext4 image; never written to.
        kvm: Use hardware virtualisation, else emulate (TCG).
        cpus: Virtual CPUs.
        memory_mib: Memory in MiB.
    """

    kernel: Path
    root: Path
    kvm: bool = False
    cpus: int = 2
    memory_mib: int = 3072


def arguments(machine: Machine, cargo_in: Path, cargo_out: Path, console: Path) -> list[str]:
    """Return qemu's whole argument list; the command's output comes on qemu's stdout.

    qemu starts below setpriv so that the kernel ends it when its starter dies, whatever kills that.
    """
    # la57=off: a fifth level of page tables only makes every emulated page walk longer.
    cpu = ["-accel", "kvm", "-cpu", "host"] if machine.kvm else ["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]
    return [
        "setpriv", "--pdeathsig", "KILL",
        QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35",
        *cpu, "-smp", str(machine.cpus), "-m", str(machine.memory_mib),
        "-kernel", str(machine.kernel / "vmlinuz"), "-initrd", str(machine.kernel / "initrd.img"),
        "-append", KERNEL_ARGUMENTS,
        "-drive", _disk(machine.root, "snapshot=on"),
        "-drive", _disk(cargo_in, "readonly=on"),
        "-drive", _disk(cargo_out, "cache=unsafe"),
        "-device", "virtio-rng-pci",
        "-chardev", f"file,id=console,path={_escaped(console)}", "-serial", "chardev:console",
        "-chardev", "stdio,id=output,signal=off", "-serial", "chardev:output",
    ]  # fmt: skip


def kvm_works(timeout_s: float = KVM_PROBE_TIMEOUT_S, device: Path = Path("/dev/kvm")) -> bool:
    """Return whether a virtual CPU under KVM runs nine bytes of code within the time.

    A /dev/kvm that opens proves nothing: on some nested hosts its CPUs never get anywhere.

    Raises:
        MachineError: qemu is not installed.
    """
    if not device.exists():
        return False
    with tempfile.NamedTemporaryFile(prefix="stallscope-vm.", suffix=".boot") as sector:
        sector.write(BOOT_SECTOR)
        sector.flush()
        probe = [
            QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-M", "pc", "-m", "16",
            "-accel", "kvm", "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
            "-drive", f"file={sector.name},format=raw,if=floppy,readonly=on",
        ]  # fmt: skip
        try:
            ended = subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            return False
        except FileNotFoundError as error:
            raise missing_qemu() from error
    return ended.returncode == BOOT_SECTOR_STATUS


def kvm_works_here(store: Path) -> bool:
    """Return whether KVM works, from the answer kept in the store since this host was started."""
    started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    kept = store / "kvm"
    if kept.is_file() and kept.read_text().split()[:1] == [started]:
        return kept.read_text().split()[1:] == ["works"]
    works = kvm_works()
    with contextlib.suppress(OSError):  # the store may belong to root
        kept.write_text(f"{started} {'works' if works else 'broken'}\n")
    return works


def missing_qemu() -> MachineError:
    """Return the error for a host without qemu."""
    return MachineError(f"{QEMU} is not installed; on Debian: apt-get install qemu-system-x86")


def _disk(path: Path, option: str) -> str:
    return f"file={_escaped(path)},format=raw,if=virtio,{option}"


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")
