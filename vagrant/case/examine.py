"""Asks ``stallscope`` about the recordings, as a user would, and gathers the answers in one plain document.

The document is all that CASE-STUDY.md is made from; it is kept beside the pictures as ``run.json``.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from case import CaseError
from case.figures import measure
from case.memory import measure as measure_memory
from case.memory import plan as memory_plan
from case.record import Note, command_shown, runs_of, stallscope, summarise
from case.steps import MemoryStep, Picture, Question, Steps, Variant

DOCUMENT_VERSION = 1
MAX_PICTURE_BYTES = 300_000
_KEPT_OF_CHANGE = ("subject", "quantity", "unit", "ratio", "low", "high", "significant", "why_not")
_KEPT = ("headline", "verdict", "paragraph", "confidence", "text", "claim_per_s")
_PLACE = re.compile(r"\{(all|typical):([a-z0-9-]+)\}")


def examine(steps: Steps, folder: Path, note: Note) -> dict[str, Any]:
    """Return the document of the runs that are recorded in a folder.

    Raises:
        CaseError: nothing is recorded, a recording cannot be read, or an answer is not the one the story needs.
    """
    examined = {name: _examine_variant(one, folder) for name, one in steps.variants.items()}
    variants = {name: found for name, found in examined.items() if found is not None}
    if not variants:
        raise CaseError(f"nothing is recorded in {folder}; run vagrant/case/run.py record")
    document: dict[str, Any] = {"version": DOCUMENT_VERSION, "article": steps.article}
    document["left_out"] = [
        {"name": one.name, "build": one.build, "about": one.about} for one in steps.variants.values() if one.optional
        and one.name not in variants
    ]  # fmt: skip
    document["conditions"] = _conditions(list(variants.values()))
    document["variants"] = variants
    document["memory"] = _memory(steps.memory, folder, note)
    document["questions"] = {}
    for name, question in steps.questions.items():
        if question.variants() <= set(variants):
            note(f"asking {name}")
            document["questions"][name] = _ask(question, variants, folder)
    return document


def _examine_variant(variant: Variant, folder: Path) -> dict[str, Any] | None:
    made = [run for run in runs_of(variant, folder) if run.is_made]
    if not made:
        return None
    if stray := set((folder / variant.name).glob("*.stall")) - {run.recording for run in made}:
        raise CaseError(f"{min(stray)} is no run of the story as it is now; delete it, or record its variant again")
    summaries = [summarise(run) for run in made]
    how = [json.loads(run.made.read_text()) for run in made]
    loads = [json.loads(run.load.read_text()) for run in made]
    runs = [measure(summary, load) for summary, load in zip(summaries, loads, strict=True)]
    typical = typical_run(runs)
    recipe = loads[0]["recipe"]
    return {
        "name": variant.name,
        "about": variant.about,
        "build": variant.build,
        "kernel": variant.kernel,
        "version": summaries[0]["targets"][0]["version"],
        "allocator": summaries[0]["targets"][0]["allocator"],
        "command": command_shown(variant),
        "load": {name: recipe[name] for name in _LOAD},
        "held": loads[0]["held"]["count"],
        "runs": runs,
        "how": [{name: one[name] for name in ("started", "load_average", "cpus", "niceness")} for one in how],
        "host": summaries[0]["host"],
        "rungs": summaries[0]["rungs"],
        "typical": {
            "file": f"{variant.name}/{made[typical].number}.stall",
            "number": made[typical].number,
            **_typical(summaries[typical]),
        },
    }


def _typical(summary: Mapping[str, Any]) -> dict[str, Any]:
    worst = max(summary["stalls"], key=lambda stall: stall["duration_ns"], default=None)
    return {
        "verdict": summary["verdict"],
        "findings": [_only(one, "rule", "weight", "title", "remedy") for one in summary["findings"]],
        "worst": _only(worst, "start_ns", "duration_ns", "clients", "overflows", "full_ns") if worst else None,
        "requests": summary["requests"],
        "reconciliation": summary["reconciliation"],
        "what_if": summary["what_if"],
        "functions": [
            _only(one, "name", "symbol", "rung", "calls", "total_ns", "self_ns", "max_ns")
            for one in summary["functions"]
        ],
    }


def _only(document: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: document[name] for name in names}


_LOAD = (
    "name", "idle", "uploaders", "announced_bytes", "sent_ratio", "small_buffers", "small_bytes", "small_period_s",
    "rate_per_s", "timeout_s", "backlog",
)  # fmt: skip


def typical_run(runs: Sequence[Mapping[str, float | None]]) -> int:
    """Return which run is nearest to the median of all: by refused connections, then by the worst stall."""

    def middle(name: str) -> float:
        return statistics.median(run[name] or 0.0 for run in runs)

    refused, worst = middle("refused"), middle("worst_ns")
    return min(
        range(len(runs)),
        key=lambda at: (abs((runs[at]["refused"] or 0) - refused), abs((runs[at]["worst_ns"] or 0) - worst)),
    )


def _conditions(variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    here = [one for one in variants if not one["kernel"]] or list(variants)
    how = [one for variant in here for one in variant["how"]]
    return {
        "runs": sum(len(one["runs"]) for one in variants),
        "first": min(one["started"] for one in how)[:10],
        "kernel": here[0]["host"]["kernel"],
        "cpus": how[0]["cpus"],
        "niceness": max(one["niceness"] for one in how),
        "load_average": statistics.median(one["load_average"] for one in how),
        "load_average_max": max(one["load_average"] for one in how),
        "lost": sum(run["lost"] for one in variants for run in one["runs"]),
        "incomplete": sum(run["incomplete"] for one in variants for run in one["runs"]),
    }


def _memory(step: MemoryStep, folder: Path, note: Note) -> list[dict[str, Any]]:
    """Return the memory measurements, making those that are not there yet."""
    found = []
    for build, size, number in memory_plan(step):
        path = folder / "memory" / f"{build}-{step.clients}-{size}-{number}.json"
        if not path.exists():
            note(f"measuring the memory of {build}, {size} bytes from each of {step.clients} clients, run {number}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(measure_memory(build, step.clients, size, number)), indent=1) + "\n")
        found.append(json.loads(path.read_text()))
    return found


def _ask(question: Question, variants: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a command of ``stallscope``, its output and its exit code, as run in the folder of the recordings."""
    words = [_PLACE.sub(lambda found: _named(found[1], found[2], variants), word) for word in question.words]
    status, output = _stallscope(words, folder)
    if status not in question.status:
        raise CaseError(
            f"{question.name}: stallscope {shlex.join(words)} ended with {status}, the story needs "
            f"{' or '.join(map(str, question.status))}: "
            f"{' '.join(output.split())[:300]}; change the story where the recordings disagree"
        )
    answer: dict[str, Any] = {
        "command": f"stallscope {shlex.join(words)}",
        "status": status,
        "output": cut_out(output, question.sections),
    }
    if words[0] in ("diff", "verify", "plan"):
        document = json.loads(_stallscope([*words, "--json"], folder)[1])
        answer["json"] = {name: document[name] for name in _KEPT if name in document}
        answer["json"]["changes"] = [
            {**_only(change, *_KEPT_OF_CHANGE), **{side: change[side]["value"] for side in ("before", "after")}}
            for change in document.get("changes", ())
        ]  # fmt: skip
    return answer


def _named(which: str, variant: str, variants: Mapping[str, Any]) -> str:
    return f"{variant}/*.stall" if which == "all" else str(variants[variant]["typical"]["file"])


def _stallscope(words: Sequence[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run([stallscope(), *words], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout or done.stderr


def cut_out(output: str, sections: Sequence[str]) -> str:
    """Return the sections of a terminal report that begin so; "" is the first paragraph; none: all of it.

    Raises:
        CaseError: there is no such section.
    """
    if not sections:
        return output.rstrip()
    paragraphs = output.rstrip().split("\n\n")
    kept = []
    for name in sections:
        matching = [one for one in paragraphs if one.startswith(name)]
        if not matching:
            raise CaseError(f'the report has no section that begins with "{name}"; see stallscope summary')
        kept.append(matching[0])
    return "\n\n".join(kept)


def draw(picture: Picture, document: Mapping[str, Any], folder: Path, target: Path) -> dict[str, Any]:
    """Draw a piece of a typical run's page, and return the command and the window, in seconds.

    Raises:
        CaseError: it cannot be drawn, or is too large for a repository.
    """
    typical = document["variants"][picture.variant]["typical"]
    words = ["report", typical["file"]]
    if picture.before_s is not None and typical["worst"] is not None:
        begin_s = typical["worst"]["start_ns"] / 1e9
        end_s = begin_s + typical["worst"]["duration_ns"] / 1e9
        first_s, last_s = max(0.0, begin_s - picture.before_s), end_s + (picture.after_s or picture.before_s)
        words += ["--from", f"{first_s:.2f}s", "--to", f"{last_s:.2f}s"]
    status, output = _stallscope([*words, "--png", str(target)], folder)
    if status != 0:
        raise CaseError(f"{picture.name} cannot be drawn: {output.strip().splitlines()[-1]}")
    _shrink(target)
    if target.stat().st_size > MAX_PICTURE_BYTES:
        raise CaseError(
            f"{target} has {target.stat().st_size} bytes, over {MAX_PICTURE_BYTES}; choose a shorter window"
        )
    return {"command": f"stallscope {shlex.join([*words, '--png', target.name])}", "file": target.name}


def _shrink(path: Path) -> None:
    """Keep a picture's most frequent colours only: lines and areas need few."""
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )
