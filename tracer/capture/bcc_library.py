"""Finds the distribution's bcc from any Python and turns its ways of failing into our errors.

bcc is pure Python over libbcc, packaged for the distribution's own Python; this module loads it also
from a virtual environment or another Python. bcc reports a failed compile on the process's stderr and
raises bare ``Exception``: ``compile_program`` catches both.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from types import ModuleType
from typing import Any

from stallscope.tracer.errors import SurroundingsError

_PLACES = (
    "/usr/lib/python3/dist-packages",
    "/usr/lib/python3*/site-packages",
    "/usr/lib64/python3*/site-packages",
    "/usr/local/lib/python3*/dist-packages",
    "/usr/local/lib/python3*/site-packages",
)
INSTALL_HINT = "install it with: apt-get install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora)"

_FENTRY_WITH_MODULE = (0, 28)
"""bcc commit 80fcfc99, v0.28: the name of a tracing program holds the module, ``kfunc__vmlinux__f``."""


def load_bcc() -> ModuleType:
    """Return the bcc module.

    Raises:
        SurroundingsError: bcc is not installed or its library cannot be loaded; names the package.
    """
    loaded = sys.modules.get("bcc")
    if loaded is not None and hasattr(loaded, "BPF"):
        return loaded
    for folder in _folders():
        try:
            return _load_from(folder)
        except OSError as error:
            raise SurroundingsError(f"cannot load bcc from {folder}: {error}; {INSTALL_HINT}") from error
        except Exception as error:  # a bcc that this Python cannot run
            raise SurroundingsError(
                f"bcc in {folder} does not run on Python {sys.version_info[0]}.{sys.version_info[1]}: {error}; "
                "use the distribution's python3"
            ) from error
    raise SurroundingsError(f"bcc is not installed; {INSTALL_HINT}")


def bcc_version() -> str:
    """Return the installed bcc's version, as ``0.26.0``, without loading it; "" when there is none."""
    for folder in _folders():
        match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (folder / "version.py").read_text(encoding="utf-8"))
        return match[1] if match else ""
    return ""


def tracing_prefixes() -> tuple[str, str]:
    """Return what bcc wants before the function in the names of fentry and fexit programs."""
    numbers = tuple(int(part) for part in bcc_version().split(".")[:2] if part.isdigit())
    module = "vmlinux__" if numbers >= _FENTRY_WITH_MODULE else ""
    return f"kfunc__{module}", f"kretfunc__{module}"


def _folders() -> Iterator[Path]:
    """Yield the folders that hold the real bcc (PyPI's ``bcc`` is an unrelated library)."""
    spec = importlib.util.find_spec("bcc") if "bcc" not in sys.modules else None
    found = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for pattern in _PLACES:
        found += sorted(Path("/").glob(f"{pattern[1:]}/bcc"), reverse=True)
    yield from (folder for folder in found if (folder / "libbcc.py").is_file())


def _load_from(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "bcc", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in older bcc
            spec.loader.exec_module(module)
    except BaseException:
        for name in [name for name in sys.modules if name == "bcc" or name.startswith("bcc.")]:
            del sys.modules[name]
        raise
    return module


def compile_program(text: str, flags: Sequence[str]) -> Any:
    """Compile BPF C to a ``bcc.BPF`` object, without kernel headers.

    Args:
        text: the joined source; maps must be in it, not in an included file (bcc rewrites only this text).
        flags: compiler flags besides the include path of ``probes/``.

    Raises:
        SurroundingsError: bcc is missing, or it cannot compile here; carries the compiler's first error.
    """
    bcc = load_bcc()
    with as_file(files("stallscope.probes")) as probes:
        # bcc takes this folder for kernel sources and changes into it, so the path must be absolute
        os.environ["BCC_KERNEL_SOURCE"] = str(Path(probes).resolve())
        messages: list[str] = []
        with _captured_stderr(messages):
            try:
                include = f"-I{Path(probes).resolve()}"
                return bcc.BPF(text=text.encode(), cflags=[include, "-Wno-everything", *flags])
            except Exception as error:
                failure: Exception = error
    first = next((line for line in messages if "error:" in line), messages[-1] if messages else str(failure))
    raise SurroundingsError(f"bcc {bcc_version()} cannot compile the probes: {first.strip()}") from failure


@contextmanager
def _captured_stderr(lines: list[str]) -> Iterator[None]:
    """Collect what is written to file descriptor 2, by libraries too, into ``lines``."""
    with tempfile.TemporaryFile() as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            lines += sink.read().decode(errors="replace").splitlines()
