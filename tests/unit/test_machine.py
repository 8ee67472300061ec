"""The test machine without booting it: qemu is a script that plays the guest's part."""

import gzip
import io
import lzma
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "vagrant"))

from click.testing import CliRunner
from machine import boot, cargo, cli, image, initrd, inputs, qemu
from machine.errors import DidNotComeUpError, MachineError

VAGRANT = inputs.VAGRANT
GREETING = "stallscope-vm ready 6.1.0-test 3.21"

FAKE_QEMU = """\
#!{python}
import io, os, signal, sys, tarfile, time

def option(flag):
    return [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == flag]

disks = [part.split(",")[0].removeprefix("file=") for part in option("-drive")]
console = option("-chardev")[0].split("path=")[1]

def say(text):
    print(text, flush=True)

def bring_back(**files):
    with tarfile.open(disks[2], "w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name.replace("__", "/").replace("_", "-"))
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))

{body}
"""


@pytest.fixture
def fake_qemu(tmp_path, monkeypatch):
    """Put a qemu on PATH whose guest does what the given lines of Python say."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()

    def install(body):
        script = folder / qemu.QEMU
        script.write_text(FAKE_QEMU.format(python=sys.executable, body=textwrap.dedent(body)))
        script.chmod(0o755)

    return install


@pytest.fixture
def project(tmp_path):
    """Make a project of one file."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "hello").write_text("hello")
    return folder


@pytest.fixture
def run(tmp_path, project):
    """Return a function that runs a command in the fake machine: exit code, output and notes."""
    machine = qemu.Machine(kernel=tmp_path, root=tmp_path / "root.img")

    def call(command="true", **options):
        output, notes = io.BytesIO(), []
        code = boot.run(machine, project, command, output=output, note=notes.append, **options)
        return code, output.getvalue().decode(), notes

    yield call
    assert list((tmp_path / "tmp").iterdir()) == [], "the run left something behind"


# --- what the image is made of


@pytest.fixture
def checkout(tmp_path):
    """Copy what decides about the image."""
    for name in (*inputs.INPUT_FILES, "vagrant/packages.txt", "pyproject.toml"):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(inputs.PROJECT / name, target)
    return tmp_path / "checkout"


def append(file, text):
    file.write_text(file.read_text() + text)


@pytest.mark.parametrize("name", ["vagrant/packages.txt", "vagrant/requirements.txt", "vagrant/machine/guest/init"])
def test_another_input_is_another_image(checkout, name):
    before = inputs.digest(checkout)
    append(checkout / name, "\nstrace\n")
    assert inputs.digest(checkout) != before


def test_another_dependency_is_another_image(checkout):
    before = inputs.digest(checkout)
    pyproject = checkout / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("dependencies = [", 'dependencies = ["polars",', 1))
    assert inputs.digest(checkout) != before


def test_the_rest_of_pyproject_and_comments_do_not_rebuild(checkout):
    before = inputs.digest(checkout)
    append(checkout / "pyproject.toml", "\n[tool.other]\nx = 1\n")
    append(checkout / "vagrant/packages.txt", "\n# a comment\n")
    assert inputs.digest(checkout) == before


def test_an_incomplete_checkout_is_named(checkout):
    (checkout / "vagrant/provision.sh").unlink()
    with pytest.raises(MachineError, match=r"cannot read .*provision\.sh: No such file.*complete checkout"):
        inputs.digest(checkout)


def test_packages_are_the_lists_and_the_kernels(checkout):
    (checkout / "vagrant/packages.txt").write_text("# words\npython3  # why\n\nmake\npython3\n")
    assert inputs.packages(checkout) == sorted([*inputs.BASE_PACKAGES, "make", "python3"])


ONE_LINE = """\
deb [trusted=yes] https://m.example/debian bookworm main
deb https://s.example/debian-security bookworm-security main
"""
DEB822 = """\
Types: deb
URIs: https://m.example/debian

Types: deb
URIs: https://s.example/debian-security
"""


@pytest.mark.parametrize(("name", "text"), [("sources.list", ONE_LINE), ("sources.list.d/debian.sources", DEB822)])
def test_mirrors_are_those_of_the_host(tmp_path, name, text):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/other.list").write_text("deb https://packages.example/apt stable main\n")
    (tmp_path / name).write_text(text)
    assert inputs.mirrors(tmp_path) == ("https://m.example/debian", "https://s.example/debian-security")


def test_mirrors_without_apt(tmp_path):
    assert inputs.mirrors(tmp_path) == (
        "http://deb.debian.org/debian",
        "http://deb.debian.org/debian-security",
    )


# --- the initrd


@pytest.fixture
def modules(tmp_path):
    """Make a lib/modules/VERSION in which ext4 needs two modules and virtio_pci is built in."""
    folder = tmp_path / "6.1.0-test"
    (folder / "kernel").mkdir(parents=True)
    (folder / "modules.dep").write_text(
        "kernel/crc16.ko:\nkernel/jbd2.ko: kernel/crc16.ko\n"
        "kernel/ext4.ko.xz: kernel/jbd2.ko kernel/crc16.ko\nkernel/virtio-blk.ko:\n"
    )
    (folder / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    for name in ("crc16", "jbd2", "virtio-blk"):
        (folder / f"kernel/{name}.ko").write_text(name)
    (folder / "kernel/ext4.ko.xz").write_bytes(lzma.compress(b"ext4 module"))
    return folder


def entries(archive):
    """Read a newc archive back: name -> (mode, content)."""
    found, position = {}, 0
    while True:
        fields = [int(archive[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        assert archive[position : position + 6] == b"070701"
        start = position + 110
        name = archive[start : start + name_size - 1].decode()
        start += name_size + -(start + name_size) % 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[start : start + size])
        position = start + size + -(start + size) % 4


def test_modules_come_after_what_they_need(modules):
    names = [file.name for file in initrd.module_files(modules, ("virtio_pci", "ext4", "virtio_blk"))]
    assert names == ["crc16.ko", "jbd2.ko", "ext4.ko.xz", "virtio-blk.ko"]


def test_a_kernel_without_a_needed_module_is_named(modules):
    with pytest.raises(MachineError, match=r"kernel 6\.1\.0-test has no module btrfs"):
        initrd.module_files(modules, ("btrfs",))


def test_the_initrd_holds_unpacked_modules_in_order(modules, tmp_path):
    for name in ("busybox", "init"):
        (tmp_path / name).write_text(name)
    packed = initrd.build_initrd(tmp_path / "busybox", tmp_path / "init", modules)
    found = entries(gzip.decompress(packed))
    assert found["init"] == (0o100755, b"init")
    assert found["bin/sh"] == (0o120777, b"busybox")
    assert found["lib/ext4.ko"] == (0o100644, b"ext4 module")
    assert found["lib/order"][1] == b"virtio_blk.ko\ncrc16.ko\njbd2.ko\next4.ko\n"
    assert initrd.build_initrd(tmp_path / "busybox", tmp_path / "init", modules) == packed


# --- what goes in and comes back


@pytest.mark.parametrize(
    ("path", "is_folder", "expected"),
    [
        ("tracer/cli.py", False, True),
        (".git", True, False),
        ("src/stallscope.egg-info", True, False),
        ("tests/__pycache__", True, False),
        (".vm", True, False),
        (".lab", True, True),
        (".lab/redis", True, True),
        (".lab/downloads", True, False),
        (".lab/redis/2.8.17", True, True),
        (".lab/redis/2.8.17/redis-server", False, True),
        (".lab/redis/2.8.17/source", True, False),
        (".lab/redis.log", False, False),
    ],
)
def test_what_goes_in(path, is_folder, expected):
    assert cargo.goes_in(path, is_folder) is expected


def test_pack_keeps_links_and_belongs_to_root(project):
    (project / "folder").mkdir()
    (project / "link").symlink_to("folder")
    (project / ".git").mkdir()
    (project / ".git/config").write_text("secret")
    disk = io.BytesIO()
    cargo.pack(disk, project, "echo hi", 7)
    disk.seek(0)
    with tarfile.open(fileobj=disk) as tar:
        members = {entry.name: entry for entry in tar}
        texts = {name: tar.extractfile(name).read() for name in members if members[name].isreg()}
    assert set(members) == {
        "vagrant/folder",
        "vagrant/hello",
        "vagrant/link",
        "run/stallscope/job",
        "run/stallscope/time-limit",
    }
    assert members["vagrant/link"].issym()
    assert {(entry.uid, entry.gid) for entry in members.values()} == {(0, 0)}
    assert texts["run/stallscope/job"] == b"echo hi\n"
    assert texts["run/stallscope/time-limit"] == b"7\n"
    assert len(disk.getvalue()) % 512 == 0


def results(disk, files, size=1 << 20):
    with tarfile.open(disk, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    os.truncate(disk, size)


def test_unpack_writes_files_and_says_the_exit_code(tmp_path):
    results(tmp_path / "disk", {"exit-code": b"3\n", "out/a": b"A", "out/sub/b": b"B"})
    assert cargo.unpack(tmp_path / "disk", tmp_path / "back") == cargo.Returned(3, 2, True)
    assert (tmp_path / "back/sub/b").read_bytes() == b"B"


def test_unpack_writes_nothing_outside(tmp_path):
    results(tmp_path / "disk", {"exit-code": b"0", "out/../../evil": b"x", "out//etc/evil": b"x"})
    assert cargo.unpack(tmp_path / "disk", tmp_path / "back" / "deep") == cargo.Returned(0, 0, True)
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "back/evil").exists()


def test_unpack_of_an_untouched_disk_is_nothing(tmp_path):
    (tmp_path / "disk").write_bytes(b"\0" * 4096)
    assert cargo.unpack(tmp_path / "disk", None) is None


def test_unpack_keeps_the_exit_code_when_files_did_not_fit(tmp_path):
    results(tmp_path / "disk", {"exit-code": b"0", "out/a": b"A", "out/big": b"x" * 20_000}, size=8192)
    assert cargo.unpack(tmp_path / "disk", tmp_path / "back") == cargo.Returned(0, 1, False)


# --- qemu


def argument_list(tmp_path, **options):
    machine = qemu.Machine(kernel=tmp_path / "linux-6.1", root=tmp_path / "a,b.img", **options)
    return qemu.arguments(machine, tmp_path / "in", tmp_path / "out", tmp_path / "log")


def test_the_emulated_machine(tmp_path):
    argv = argument_list(tmp_path, cpus=3, memory_mib=512)
    assert argv[:3] == ["setpriv", "--pdeathsig", "KILL"]
    assert argv[argv.index("-accel") + 1] == "tcg,thread=multi"
    assert argv[argv.index("-smp") + 1] == "3"
    assert argv[argv.index("-m") + 1] == "512"
    disks = [argv[i + 1] for i, word in enumerate(argv) if word == "-drive"]
    assert disks == [
        f"file={tmp_path}/a,,b.img,format=raw,if=virtio,snapshot=on",
        f"file={tmp_path}/in,format=raw,if=virtio,readonly=on",
        f"file={tmp_path}/out,format=raw,if=virtio,cache=unsafe",
    ]


def test_the_machine_under_kvm(tmp_path):
    argv = argument_list(tmp_path, kvm=True)
    assert argv[argv.index("-accel") + 1 : argv.index("-accel") + 4] == ["kvm", "-cpu", "host"]


@pytest.mark.parametrize(("body", "works"), [("sys.exit(33)", True), ("sys.exit(0)", False), ("signal.pause()", False)])
def test_kvm_works_only_when_it_runs_code_in_time(fake_qemu, tmp_path, body, works):
    fake_qemu("")
    script = Path(shutil.which(qemu.QEMU))
    script.write_text(f"#!{sys.executable}\nimport signal, sys\n{body}\n")
    assert qemu.kvm_works(timeout_s=5.0 if works else 0.5, device=tmp_path) is works


def test_without_the_device_nothing_is_tried(fake_qemu, tmp_path):
    fake_qemu("sys.exit(33)")
    assert qemu.kvm_works(device=tmp_path / "none") is False


def test_the_answer_about_kvm_is_kept_until_the_host_is_started_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(qemu, "kvm_works", lambda: bool(asked.append(1)))
    assert [qemu.kvm_works_here(tmp_path) for _ in range(3)] == [False] * 3
    assert len(asked) == 1
    (tmp_path / "kvm").write_text("another-start works\n")
    assert qemu.kvm_works_here(tmp_path) is False
    assert len(asked) == 2


# --- one run


def test_a_run_returns_exit_code_output_and_files(fake_qemu, run, tmp_path):
    fake_qemu(f"""
        with tarfile.open(disks[1]) as tar:
            job = tar.extractfile("run/stallscope/job").read().decode()
        open(console, "w").write("kernel line\\n")
        say("{GREETING}")
        say("job: " + job.strip())
        bring_back(exit_code="7", out__file="content")
    """)
    code, output, notes = run("make check", out=tmp_path / "back")
    assert (code, output) == (7, "job: make check\n")
    assert notes == ["Linux 6.1.0-test is up, 3.21 s after its start"]
    assert (tmp_path / "back/file").read_text() == "content"
    assert (tmp_path / "back/console.log").read_text() == "kernel line\n"


def test_what_qemu_says_before_the_guest_is_a_note(fake_qemu, run):
    fake_qemu(f'say("qemu: a warning"); say("{GREETING}"); bring_back(exit_code="0")')
    code, output, notes = run()
    assert (code, output) == (0, "")
    assert notes[0] == "qemu: a warning"


def test_a_machine_that_never_greets(fake_qemu, run):
    fake_qemu("""
        open(console, "w").write("\\n".join(f"line {n}" for n in range(100)))
        signal.pause()
    """)
    with pytest.raises(DidNotComeUpError, match="was not up after 1 s") as caught:
        run(limits=boot.Limits(boot_s=1))
    assert caught.value.console.splitlines() == [f"line {n}" for n in range(60, 100)]


def test_a_machine_that_ends_early(fake_qemu, run):
    fake_qemu(f'open(console, "w").write("Kernel panic"); say("{GREETING}")')
    with pytest.raises(DidNotComeUpError, match="ended before its command did") as caught:
        run()
    assert caught.value.console == "Kernel panic"


def test_a_guest_that_does_not_end_its_command_is_killed(fake_qemu, run, monkeypatch):
    monkeypatch.setattr(boot, "AFTER_COMMAND_S", 0.0)
    fake_qemu(f'say("{GREETING}"); say(f"pid {{os.getpid()}}"); signal.pause()')
    code, output, _ = run(limits=boot.Limits(command_s=1))
    assert code == boot.EXIT_TIMED_OUT
    assert not Path("/proc", output.split()[1]).exists()


def test_a_command_that_the_guest_ended_still_brings_files_back(fake_qemu, run, tmp_path):
    fake_qemu(f'say("{GREETING}"); bring_back(exit_code="124", out__half="done")')
    code, _, notes = run(out=tmp_path / "back")
    assert code == boot.EXIT_TIMED_OUT
    assert "--timeout" in notes[-1]
    assert (tmp_path / "back/half").exists()


def test_results_that_do_not_fit_are_an_error(fake_qemu, run):
    fake_qemu(f"""
        say("{GREETING}")
        bring_back(exit_code="0", out__big="x" * (2 << 20))
        os.truncate(disks[2], 1 << 20)
    """)
    code, _, notes = run(limits=boot.Limits(results_mib=1))
    assert code == boot.EXIT_DID_NOT_COME_UP
    assert "raise --results-mib" in notes[-1]


def test_without_qemu_the_package_is_named(run, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="apt-get install qemu-system-x86"):
        run()


def test_what_a_killed_run_left_behind_is_removed_by_the_next(fake_qemu, run, tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (tmp_path / f"tmp/stallscope-vm.{int(ended.stdout)}.abc").mkdir()
    fake_qemu(f'say("{GREETING}"); bring_back(exit_code="0")')
    assert run()[0] == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_signal_ends_qemu_too(fake_qemu, store, project, tmp_path, number, code):
    fake_qemu(f'say("{GREETING}"); say(f"pid {{os.getpid()}}"); signal.pause()')
    command = [VAGRANT / "vm", "run", "--accel", "tcg", "--store", store, "--project", project, "true"]
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        pid = int(process.stdout.readline().split()[1])
        fake = os.pidfd_open(pid)
        try:
            process.send_signal(number)
            assert process.wait(30) == code
            assert ends(fake)
        finally:
            os.close(fake)
    if number != signal.SIGKILL:
        assert list((tmp_path / "tmp").iterdir()) == []


def ends(pidfd):
    """Wait until the process is gone; a pidfd becomes readable then."""
    return bool(select.select([pidfd], [], [], 30)[0])


# --- the command line and the build


@pytest.fixture
def store(tmp_path):
    """Make a store with an image that is current."""
    folder = tmp_path / "store"
    (folder / "image").mkdir(parents=True)
    (folder / "image/root.img").touch()
    (folder / "image/inputs").write_text(inputs.digest())
    return folder


def test_run_without_an_image(tmp_path):
    result = CliRunner().invoke(cli.main, ["run", "--store", str(tmp_path), "true"])
    assert result.exit_code == boot.EXIT_DID_NOT_COME_UP
    assert result.stderr == f"vm: no image in {tmp_path}; build it with: sudo make vm\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["a | b"], "a | b"),
        (["python", "-c", "print( 1 )"], "python -c 'print( 1 )'"),
        (["ls", "-l"], "ls -l"),
    ],
)
def test_one_argument_is_a_line_and_several_are_a_command(monkeypatch, store, words, line):
    seen = []
    monkeypatch.setattr(boot, "run", lambda machine, project, command, **_: bool(seen.append(command)))
    result = CliRunner().invoke(cli.main, ["run", "--accel", "tcg", "--store", str(store), "--", *words])
    assert result.exit_code == 0
    assert seen == [line]


def test_a_machine_that_did_not_come_up_shows_its_console(monkeypatch, store):
    def fail(*_, **__):
        raise DidNotComeUpError("the machine was not up after 1 s", "last words")

    monkeypatch.setattr(boot, "run", fail)
    result = CliRunner().invoke(cli.main, ["run", "--accel", "tcg", "--store", str(store), "true"])
    assert result.exit_code == boot.EXIT_DID_NOT_COME_UP
    assert result.stderr == "last words\nvm: the machine was not up after 1 s\n"


def test_a_current_image_is_not_built_again(store):
    result = CliRunner().invoke(cli.main, ["build", "--store", str(store)])
    assert result.exit_code == 0
    assert result.stderr == f"vm: {store}/image is up to date\n"


def test_building_needs_root(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    with pytest.raises(MachineError, match="run sudo make vm"):
        image.build(tmp_path, print)


def test_missing_tools_are_named_by_package(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(MachineError, match="apt-get install coreutils e2fsprogs mmdebstrap util-linux"):
        image.build(tmp_path, print)


def test_a_failing_step_leaves_the_old_image_and_nothing_else(store, monkeypatch):
    monkeypatch.setattr(image, "_check_host", lambda: None)
    monkeypatch.setattr(inputs, "packages", lambda *_: [])
    monkeypatch.setattr(inputs, "PACKAGE", store)
    (store / "guest").mkdir()
    script = store / "guest/tree.sh"
    script.write_text("#!/bin/sh\nmkdir -p $1\necho no route to mirror\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(MachineError, match=r"^the root tree failed: no route to mirror; see .*build\.log$"):
        image.build(store, lambda _: None, force=True)
    assert sorted(path.name for path in store.iterdir()) == ["build.log", "guest", "image", "lock"]


@pytest.mark.skipif(shutil.which("vagrant") is None, reason="vagrant is not installed")
def test_vagrant_accepts_the_vagrantfile(tmp_path):
    environment = {
        **os.environ,
        "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
        "STALLSCOPE_VM_DRIVER": "qemu",
    }
    ended = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=VAGRANT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "validated successfully" in ended.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_what_a_killed_build_left_mounted_is_unmounted_not_emptied(tmp_path: Path) -> None:
    source, tree = tmp_path / "source", tmp_path / "build 1"
    inner = tree / "tree" / "proc"
    for folder in (source, inner):
        folder.mkdir(parents=True)
    (source / "kept").write_text("kept")
    done = subprocess.run(["mount", "--bind", str(source), str(inner)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting is refused here: {done.stderr.strip()}")
    try:
        image.remove_tree(tree)
    finally:
        subprocess.run(["umount", "--lazy", str(inner)], capture_output=True)
    assert not tree.exists()
    assert (source / "kept").read_text() == "kept"
