"""The real machine: boots each kernel and uses what the kernel tests will use in it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "vagrant"))

from machine import image, inputs, qemu

STORE = inputs.PROJECT / ".vm"

pytestmark = pytest.mark.skipif(
    shutil.which(qemu.QEMU) is None or not image.root_image(STORE).is_file(),
    reason="needs qemu-system-x86_64 and the image of `make vm`",
)

# Two kprobes would not tell a missed hit from a wrong one: connect a prime number of times and count.
COUNT_SYNS = """
import os
import socket

from bcc import BPF

CONNECTIONS = 37
SOURCE = "BPF_ARRAY(hits, u64, 1); int hit(void *ctx) { hits.atomic_increment(0); return 0; }"
# headers of the project instead of the kernel's
os.environ["BCC_KERNEL_SOURCE"] = "/vagrant/probes"
program = BPF(text=SOURCE, cflags=["-I/vagrant/probes", "-Wno-everything"])
program.attach_kprobe(event="tcp_conn_request", fn_name="hit")
with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
    clients = [socket.create_connection(server.getsockname()) for _ in range(CONNECTIONS)]
for client in clients:
    client.close()
assert program["hits"][0].value == CONNECTIONS, program["hits"][0].value
"""

JOB = f"""
set -e
uname -r >$STALLSCOPE_OUT/release
test "$PWD" = /vagrant
test -s /sys/kernel/btf/vmlinux
modprobe sch_netem
cat >/tmp/count_syns.py <<'PYTHON'
{COUNT_SYNS}
PYTHON
python /tmp/count_syns.py
stallscope_version=$(python -c 'import stallscope; print(stallscope.__version__)')
test -n "$stallscope_version"
echo to stdout
echo to stderr >&2
exit 37
"""


def vm(*words, timeout_s=420):
    command = [sys.executable, inputs.VAGRANT / "vm", "run", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.mark.parametrize("kernel", list(inputs.KERNELS))
def test_a_probe_fires_and_the_results_come_back(kernel, tmp_path):
    ended = vm("--kernel", kernel, "--out", tmp_path, "--", JOB)
    assert ended.returncode == 37, ended.stdout + ended.stderr
    assert ended.stdout.endswith("to stdout\nto stderr\n")
    assert (tmp_path / "release").read_text().startswith(f"{kernel}.")


def test_the_guest_ends_a_command_that_takes_too_long(tmp_path):
    ended = vm("--timeout", "1", "--out", tmp_path, "--", "echo half >$STALLSCOPE_OUT/half; sleep 600")
    assert ended.returncode == 124, ended.stderr
    assert (tmp_path / "half").read_text() == "half\n"


def test_a_machine_that_cannot_boot_says_why(tmp_path):
    """Without a file system on its root disk the initrd powers the machine off."""
    broken = tmp_path / "store"
    shutil.copytree(image.kernel_folder(STORE, "6.1"), image.kernel_folder(broken, "6.1"))
    image.root_image(broken).write_bytes(b"\0" * (1 << 20))
    ended = vm("--store", broken, "--accel", "tcg", "true")
    assert ended.returncode == 125
    assert "initrd: cannot mount /dev/vda" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("vm: the machine ended before its command did")
