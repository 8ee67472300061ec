"""The command line: parse, call one function, print. Our messages go to stderr."""

from __future__ import annotations

import functools
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from . import boot, image, inputs, qemu
from .errors import DidNotComeUpError, MachineError

EXIT_INTERRUPTED = 130

Body = TypeVar("Body", bound=Callable[..., None])


def _note(text: str) -> None:
    click.echo(f"vm: {text}", err=True)


def _reports_errors(exit_code: int) -> Callable[[Body], Body]:
    """Turn our errors into one line on stderr and this exit code; a signal ends what we started."""

    def decorate(body: Body) -> Body:
        @functools.wraps(body)
        def call(*args: object, **kwargs: object) -> None:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda number, _: sys.exit(128 + number))
            try:
                body(*args, **kwargs)
            except MachineError as error:
                if isinstance(error, DidNotComeUpError) and error.console:
                    click.echo(error.console, err=True)
                _note(str(error))
                sys.exit(exit_code)
            except KeyboardInterrupt:
                _note("interrupted")
                sys.exit(EXIT_INTERRUPTED)

        return call  # type: ignore[return-value]

    return decorate


_store = click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    default=inputs.PROJECT / ".vm",
    envvar="STALLSCOPE_VM_STORE",
    help="Folder of the image.  [default: .vm in the project]",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Build and boot Stallscope's test machine under plain qemu, with or without KVM."""


@main.command()
@_store
@click.option("--force", is_flag=True, help="Build even when nothing changed: fetches newer packages.")
@_reports_errors(1)
def build(store: Path, force: bool) -> None:
    r"""Build the image, unless it is there and current. Needs root, and a Debian mirror and PyPI.

    \b
    Example:
      sudo vagrant/vm build
    """
    image.build(store, _note, force=force)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_store
@click.option(
    "--kernel",
    type=click.Choice(list(inputs.KERNELS)),
    default="6.1",
    show_default=True,
    help="Linux version.",
)
@click.option(
    "--accel",
    type=click.Choice(["auto", "kvm", "tcg"]),
    default="auto",
    envvar="STALLSCOPE_VM_ACCEL",
    show_default=True,
    help="kvm, or tcg to emulate; auto tries once per start of this host whether KVM runs code.",
)
@click.option("--cpus", type=click.IntRange(1), default=2, show_default=True, envvar="STALLSCOPE_VM_CPUS")
@click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(256),
    default=3072,
    show_default=True,
    metavar="MIB",
    envvar="STALLSCOPE_VM_MEMORY",
)
@click.option(
    "--timeout",
    "command_s",
    type=click.IntRange(1),
    default=1500,
    show_default=True,
    metavar="SECONDS",
    help="For the command.",
)
@click.option(
    "--boot-timeout",
    "boot_s",
    type=click.IntRange(1),
    default=180,
    show_default=True,
    metavar="SECONDS",
    help="For the machine to come up.",
)
@click.option(
    "--results-mib",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Room for the files that come back.",
)
@click.option(
    "--project",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=inputs.PROJECT,
    help="Folder that becomes /vagrant.  [default: this project]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for what the command leaves in $STALLSCOPE_OUT, and console.log.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@_reports_errors(boot.EXIT_DID_NOT_COME_UP)
def run(
    store: Path,
    kernel: str,
    accel: str,
    cpus: int,
    memory_mib: int,
    command_s: int,
    boot_s: int,
    results_mib: int,
    project: Path,
    out: Path | None,
    command: tuple[str, ...],
) -> None:
    r"""Run a command as root in a fresh machine, in a copy of the project at /vagrant.

    One argument is a line for bash, several are one command. The exit code is the command's; 124 when
    its time was up, 125 when the machine did not come up.

    \b
    Examples:
      vagrant/vm run -- python -m pytest tests/kernel -q
      vagrant/vm run --kernel 6.12 --out results 'nstat -az >$STALLSCOPE_OUT/nstat'
    """
    if not image.root_image(store).is_file():
        raise MachineError(f"no image in {store}; build it with: sudo make vm")
    if not image.is_current(store):
        _note("the image is older than what it is made of; sudo make vm brings it up to date")
    started = time.monotonic()
    machine = qemu.Machine(
        kernel=image.kernel_folder(store, kernel),
        root=image.root_image(store),
        kvm=accel == "kvm" or (accel == "auto" and qemu.kvm_works_here(store)),
        cpus=cpus,
        memory_mib=memory_mib,
    )
    code = boot.run(
        machine,
        project,
        command[0] if len(command) == 1 else shlex.join(command),
        output=sys.stdout.buffer,
        note=_note,
        out=out,
        limits=boot.Limits(boot_s=boot_s, command_s=command_s, results_mib=results_mib),
    )
    _note(f"exit code {code} after {time.monotonic() - started:.1f} s, {'KVM' if machine.kvm else 'emulated'}")
    sys.exit(code)
