"""The story as data: what ``steps.toml`` says, checked."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from lab.build import is_built, load_builds
from lab.load import RECIPE_OPTIONS
from lab.recipes import RECIPES

from case import CaseUsageError

STEPS = Path(__file__).with_name("steps.toml")
PLACE = re.compile(r"\{(?:all|typical):([a-z0-9-]+)\}")
_NAME = re.compile(r"[a-z0-9-]+")
_OPTIONS = {flag.removeprefix("--") for flag, *_ in RECIPE_OPTIONS}


@dataclass(frozen=True)
class Variant:
    """One server under one load; the fields are described at the head of ``steps.toml``."""

    name: str
    about: str
    build: str
    recipe: str
    runs: int
    load: dict[str, float] = field(default_factory=dict)
    record: tuple[str, ...] = ()
    kernel: str = ""
    first: str = ""
    wait_for: str = ""
    optional: bool = False

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise CaseUsageError(f'"{self.name}" cannot be a folder; name variants like upgrade-3')
        if self.build not in load_builds():
            raise CaseUsageError(f"{self.name}: there is no build {self.build}; see vagrant/lab/build.py --list")
        if self.recipe not in RECIPES:
            raise CaseUsageError(f"{self.name}: there is no recipe {self.recipe}; see vagrant/lab/load.py --recipes")
        if unknown := set(self.load) - _OPTIONS:
            raise CaseUsageError(f"{self.name}: incident.py has no option --{min(unknown)}; see its --help")
        if unsafe := [
            word
            for word in (*map(str, self.load.values()), *self.record, self.wait_for or "-")
            if shlex.quote(word) != word
        ]:
            raise CaseUsageError(f"{self.name}: {unsafe[0]} would have to be quoted for the shell; write it without")
        if self.runs < 1:
            raise CaseUsageError(f"{self.name}: runs is {self.runs}; write 1 or more")

    @property
    def is_built(self) -> bool:
        """Whether the lab has its server, made from the inputs as they are now."""
        return is_built(load_builds()[self.build])

    def load_words(self) -> list[str]:
        """Return the words for ``incident.py`` that choose the server and the load."""
        words = ["--build", self.build, "--recipe", self.recipe]
        words += [word for name, value in self.load.items() for word in (f"--{name}", str(value))]
        return [*words, "--wait-for", self.wait_for] if self.wait_for else words


@dataclass(frozen=True)
class MemoryStep:
    """How to measure what the patch keeps: per build and size of the one command, ``runs`` times.

    Attributes:
        builds: the lab's servers, the one without the patch first.
        clients: how many are connected; value_bytes: what each has sent once, one measurement per size.
    """

    builds: tuple[str, ...]
    clients: int
    value_bytes: tuple[int, ...]
    runs: int


@dataclass(frozen=True)
class Question:
    """A command of ``stallscope`` on recordings, whose output the study shows.

    Attributes:
        words: ``{all:VARIANT}`` stands for its recordings, ``{typical:VARIANT}`` for the run nearest to their median.
        status: the exit codes that the story allows.
        sections: with what the parts of the output begin that are shown; all of it where there are none.
    """

    name: str
    words: tuple[str, ...]
    status: tuple[int, ...] = (0,)
    sections: tuple[str, ...] = ()

    def variants(self) -> set[str]:
        """Return the variants it asks about."""
        return {name for word in self.words for name in PLACE.findall(word)}


@dataclass(frozen=True)
class Picture:
    """A piece of a variant's page: so many seconds before and after its worst stall, or all of it."""

    name: str
    variant: str
    before_s: float | None = None
    after_s: float | None = None


@dataclass(frozen=True)
class Steps:
    """All of ``steps.toml``; ``article`` is what the article says, by name."""

    variants: dict[str, Variant]
    memory: MemoryStep
    questions: dict[str, Question]
    pictures: dict[str, Picture]
    article: dict[str, Any]


def load_steps(path: Path = STEPS) -> Steps:
    """Return the story that a file of this form tells.

    Raises:
        CaseUsageError: a key, a build, a recipe or an option in it does not exist.
    """
    document = tomllib.loads(path.read_text())
    try:
        variants = {}
        for name, fields in document["variant"].items():
            words: dict[str, Any] = {"record": tuple(fields["record"])} if "record" in fields else {}
            variants[name] = Variant(**{**fields, **words, "name": name})
        memory = document["memory"]
        sizes, builds = tuple(memory["value_bytes"]), tuple(memory["builds"])
        step = MemoryStep(**{**memory, "value_bytes": sizes, "builds": builds})
        questions = {name: _question(name, fields) for name, fields in document.get("question", {}).items()}
        pictures = {name: Picture(name, **fields) for name, fields in document.get("picture", {}).items()}
        for name in (
            *(one for asked in questions.values() for one in asked.variants()),
            *(picture.variant for picture in pictures.values()),
        ):
            variants[name]
    except (KeyError, TypeError) as error:
        raise CaseUsageError(f"cannot read {path}: {error}; compare it with the comment at its head") from None
    return Steps(variants, step, questions, pictures, document.get("article", {}))


def _question(name: str, fields: dict[str, Any]) -> Question:
    lists: dict[str, Any] = {key: tuple(fields[key]) for key in ("words", "sections", "status") if key in fields}
    return Question(**{**fields, **lists, "name": name})
