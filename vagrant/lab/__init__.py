"""The laboratory: the Redis builds, the load and the runner that reproduce the incident.

Only the standard library is needed (and tomli on Python 3.10), so that a machine being provisioned can
build the servers before anything else is installed. The modules, from the ground up: ``build`` makes the
servers, ``server`` runs one, ``recipes`` names the loads that are known to reproduce something, ``load``
puts one on a server with the roles of ``clients`` and prints an ``outcome``, ``listener`` watches the
kernel's side, and ``incident`` puts them together around a command.
"""

from __future__ import annotations

import os
from pathlib import Path

EXIT_USAGE = 2
EXIT_UNABLE = 4
"""Exit codes of the lab's commands; the same as those of ``stallscope``."""


class LabError(Exception):
    """Something in the lab cannot be done on this machine; ``str()`` is one line that names the remedy."""

    exit_code = EXIT_UNABLE


class LabUsageError(LabError):
    """What was asked for does not exist or is out of bounds."""

    exit_code = EXIT_USAGE


def home() -> Path:
    """Return the folder of sources and builds: ``STALLSCOPE_LAB``, or ``.lab`` in the project."""
    configured = os.environ.get("STALLSCOPE_LAB")
    if configured:
        return Path(configured).expanduser().resolve()
    return Path(__file__).resolve().parents[2] / ".lab"
