"""The page as a file: packed columns, valid HTML, nothing of a recording's text taken for HTML; and the command."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import html5lib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from recordings import DATA, PROBES, PURGE, Builder, add_storm, manifest, quiet

from stallscope.reports.timeline.columns import Columns
from stallscope.reports.timeline.compute import build_timeline
from stallscope.reports.timeline.document import script_json
from stallscope.reports.timeline.page import key_numbers, render
from stallscope.reports.timeline.picture import BROWSER_VARIABLE
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.manifest import Note
from stallscope.tracer.recording import read_recording

STALLSCOPE = str(Path(sys.executable).with_name("stallscope"))
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'{{7*191}}"


def page_of(path: Path) -> str:
    return render(build_timeline(analyse(read_recording(path))))


def report(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([STALLSCOPE, "report", *map(str, words)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **variables})  # fmt: skip


def unpacked(index: dict[str, dict[str, Any]], packed: str, name: str) -> list[int]:
    """Return a column, read as assets/columns.js reads it."""
    data = gzip.decompress(base64.b64decode(packed))
    column = index[name]
    count, width = column["count"], column["width"]
    planes = [data[column["offset"] + plane * count :][:count] for plane in range(width)]
    values = [
        int(column["base"]) + sum(octets[place] << 8 * plane for plane, octets in enumerate(planes))
        for place in range(count)
    ]
    if "first" not in column:
        return values
    total, result = column["first"], []
    for step in values:
        total += step
        result.append(total)
    return result


class TestColumns:
    @settings(deadline=None)
    @given(
        arrays(np.int64, st.integers(0, 40), elements=st.integers(-(2**62), 2**62)),
        arrays(np.uint64, st.integers(0, 40), elements=st.integers(0, 2**64 - 1)),
        arrays(np.int64, st.integers(0, 40), elements=st.integers(-(2**52), 2**52)),
    )
    def test_come_back_as_they_were(
        self, signed: npt.NDArray[np.int64], unsigned: npt.NDArray[np.uint64], times: npt.NDArray[np.int64]
    ) -> None:
        columns = Columns()
        columns.add("signed", signed)
        columns.add("unsigned", unsigned)
        columns.add("times", times, ascending=True)
        index, packed = columns.packed()
        assert unpacked(index, packed, "signed") == signed.tolist()
        assert unpacked(index, packed, "unsigned") == unsigned.tolist()
        assert unpacked(index, packed, "times") == times.tolist()
        for name, values in (("signed", signed), ("unsigned", unsigned)):
            beyond = any(abs(value) > 2**53 for value in values.tolist())
            assert index[name].get("wide", False) or not beyond

    def test_take_little_room_where_values_are_alike(self) -> None:
        columns = Columns()
        columns.add("start", np.arange(100_000) * 1_000 + 7 * 10**12, ascending=True)
        index, packed = columns.packed()
        assert index["start"]["width"] == 2
        assert len(packed) < 1_000


class TestPage:
    @pytest.fixture(scope="class")
    @staticmethod
    def evil(tmp_path_factory: pytest.TempPathFactory) -> str:
        """Return the page of a recording in which every text is an attack."""
        made = manifest()
        made = replace(
            made,
            probes=tuple(replace(probe, name=EVIL, note=EVIL, rung=EVIL) if probe.id == PURGE else probe
                         for probe in PROBES),
            targets=(replace(made.targets[0], version=EVIL, exe=EVIL, product=EVIL),),
            listeners=(replace(made.listeners[0], address=EVIL),),
            host={"kernel": EVIL},
            rungs={EVIL: EVIL},
            notes=(Note(made.started_ns, EVIL),),
        )  # fmt: skip
        path = tmp_path_factory.mktemp("evil") / "<b>&.stall"
        return page_of(quiet(add_storm(Builder(made), 1000), 900).write(path, 2000))

    @pytest.mark.parametrize("name", ["known-call", "empty", "cut-short", "with-losses", "refused"])
    def test_is_valid(self, name: str) -> None:
        page = page_of(DATA / f"{name}.stall")
        # the parser is slow and the packed data is only letters
        page = re.sub(r'(<script type="text/plain" id="\w+">)[^<]*', r"\1", page)
        html5lib.HTMLParser(strict=True).parse(page)

    def test_takes_no_text_of_a_recording_for_html(self, evil: str) -> None:
        assert "<script>alert" not in evil
        assert "<img" not in evil
        assert "{{7*191}}</td>" in evil, "names are no templates either"
        document = re.search(r'<script type="application/json" id="document">(.*?)</script>', evil, re.DOTALL)
        assert document is not None
        names = [function["name"] for function in json.loads(document[1])["functions"]]
        assert EVIL in names

    def test_names_nothing_on_the_network(self) -> None:
        page = page_of(DATA / "known-call.stall")
        outside = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", page)
        assert outside == ["data:,"]
        assert not re.search(r"@import|url\(", page)

    def test_says_the_key_numbers_without_scripts(self) -> None:
        timeline = build_timeline(analyse(read_recording(DATA / "known-call.stall")))
        found = re.search(r"<noscript>(.*?)</noscript>", render(timeline), re.DOTALL)
        assert found is not None
        for number in key_numbers(timeline):
            assert f"{number.name}: {number.value}" in found[1]
        values = {number.name: number.value for number in key_numbers(timeline)}
        assert values == {
            "Longest stall": "620 ms",
            "Refused connections": "43",
            "Longest accept queue": "512 of 511",
            "Calls recorded": "20",
            "Event loop busy": "650 ms",
            "Events lost": "0",
        }

    @pytest.mark.parametrize(("name", "mood"), [("known-call", "trouble"), ("empty", "unknown")])
    def test_mood(self, name: str, mood: str) -> None:
        assert f'<h1 id="verdict" class="{mood}">' in page_of(DATA / f"{name}.stall")

    def test_nothing_wrong_is_said(self, tmp_path: Path) -> None:
        page = page_of(quiet(Builder().span(PURGE, 100, 1, 4096), 900).write(tmp_path / "quiet.stall", 1000))
        assert '<h1 id="verdict" class="calm">Nothing wrong was seen in 1.00 s' in page

    def test_json_in_a_script_cannot_end_it(self) -> None:
        assert "<" not in script_json({"name": EVIL})
        assert json.loads(script_json({"name": EVIL})) == {"name": EVIL}


class TestCommand:
    def test_writes_the_page_beside_nothing_else(self, tmp_path: Path) -> None:
        output = tmp_path / "page.html"
        done = report(DATA / "known-call.stall", "-o", output)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr == f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)\n"
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]

    def test_window_is_in_the_page(self, tmp_path: Path) -> None:
        output = tmp_path / "page.html"
        done = report(DATA / "two-stalls.stall", "--from", "1.68s", "--to", "15:06:42.4", "-o", output)
        assert done.returncode == 0, done.stderr
        page = output.read_text()
        assert '"offset_ns":1680000000' in page
        assert "1.6900 s" in page, "times are those of the recording"

    def test_no_display(self, tmp_path: Path) -> None:
        done = report(DATA / "empty.stall", "-o", tmp_path / "x.html", "--open", DISPLAY="", WAYLAND_DISPLAY="")
        assert done.returncode == 0
        assert "not opened: there is no display here; copy" in done.stderr

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--from", "9s"), "the window starts at 9 s, after the end of the recording; it lasts 4.00 s"),
            (("--from", "soon"), 'cannot read "soon" as a time'),
            (("--from", "2s", "--to", "1s"), "the window ends at 1 s, not after its start at 2 s"),
            (("-o", "/nowhere/x.html"), "cannot write /nowhere/x.html: No such file or directory"),
        ],
    )
    def test_bad_requests_are_one_line(self, words: tuple[str, ...], message: str, tmp_path: Path) -> None:
        done = report(DATA / "known-call.stall", *([] if "-o" in words else ["-o", tmp_path / "x.html"]), *words)
        assert done.returncode == (1 if "-o" in words else 2)
        (line,) = done.stderr.splitlines()
        assert line.startswith("stallscope: ")
        assert message in line

    def test_never_overwrites_the_recording(self, tmp_path: Path) -> None:
        path = tmp_path / "rec.html"
        path.write_bytes((DATA / "empty.stall").read_bytes())
        done = report(path, "-o", path)
        assert done.returncode == 2
        assert "is the recording itself" in done.stderr
        assert path.read_bytes() == (DATA / "empty.stall").read_bytes()

    def test_without_a_browser_there_is_no_picture(self, tmp_path: Path) -> None:
        output = tmp_path / "x.png"
        done = report(DATA / "empty.stall", "--png", output, **{BROWSER_VARIABLE: "no-such-browser"})
        assert done.returncode == 4
        (line,) = done.stderr.splitlines()
        assert "no-such-browser is no program" in line
        assert "apt-get install chromium" in line
        assert not output.exists()

    def test_a_browser_that_fails_is_one_line(self, tmp_path: Path) -> None:
        done = report(DATA / "empty.stall", "--svg", tmp_path / "x.svg", **{BROWSER_VARIABLE: "/bin/false"})
        assert done.returncode == 1
        assert done.stderr == "stallscope: /bin/false failed: exit code 1\n"
        assert list(tmp_path.iterdir()) == []
