"""The case: the incident's story told again as commands, recorded, measured and written down.

It uses Stallscope as its users do, by its command line, and the lab's commands for servers and load. From the
ground up: ``steps`` reads ``steps.toml``, the story as data; ``record`` runs what is not recorded yet;
``memory`` measures what the threshold patch keeps; ``examine`` asks ``stallscope`` about the recordings;
``figures`` makes numbers with intervals of its answers; ``study`` writes CASE-STUDY.md from the numbers;
``run`` is the command line.
"""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNABLE = 4
"""Exit codes, the same as those of ``stallscope``."""


class CaseError(Exception):
    """A step of the case did not do what it is for; ``str()`` is one line that names the remedy."""

    exit_code = EXIT_FAILED


class CaseUsageError(CaseError):
    """What was asked for does not exist, or ``steps.toml`` is wrong."""

    exit_code = EXIT_USAGE
