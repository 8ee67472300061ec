"""Whatever is in an input, importing it ends in a recording that can be summarised, or in one line.

STALLSCOPE_FUZZ_EXAMPLES=2000 looks longer.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from captures import Connection, enhanced, in_order, interface, pcap, section
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import DATA, Builder, add_storm
from rich.console import Console

from stallscope.reports.terminal import render
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.summary import summarise
from stallscope.tracer.errors import StallscopeError
from stallscope.tracer.imports.pcap import Capture
from stallscope.tracer.imports.replies import parse, sections
from stallscope.tracer.imports.run import run_import
from stallscope.tracer.layout import EVENT
from stallscope.tracer.recording import RecordingWriter, read_recording

EXAMPLES = int(os.environ.get("STALLSCOPE_FUZZ_EXAMPLES", "40"))
FUZZ = settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])

PACKETS = in_order(
    Connection(peer_port=1).syn(0).syn(1000).syn_ack(1001).ack(1002).send(1003, b"PING\r\n").send(1300, b"PING\r\n"),
    Connection(peer_port=2, server="2001:db8::1", client="2001:db8::7").syn(500).rst(501),
)
CAPTURES = {
    "pcap": pcap(PACKETS),
    "big endian": pcap(PACKETS, order=">", nanoseconds=True),
    "any": pcap(PACKETS, link=276),
    "pcapng": section() + interface() + b"".join(map(enhanced, PACKETS)),
    "gzip": gzip.compress(pcap(PACKETS)),
}
TEXTS = {path.name: path.read_bytes() for path in sorted((DATA / "redis-cli").iterdir())}


def go_all_the_way(path: Path, into: Path | None = None) -> bool:
    """Import a file, summarise and render the recording; returns whether it could be imported."""
    out = path.with_name("out.stall")
    try:
        run_import([path], into, out, (6379,), force=True)
    except StallscopeError as error:
        message = str(error)
        assert "\n" not in message
        return False
    summary = summarise(analyse(read_recording(out)))
    json.dumps(summary.to_json(), allow_nan=False)
    file = io.StringIO()
    render(summary, Console(file=file, width=80))
    assert file.getvalue().encode()
    return True


@FUZZ
@given(content=st.binary(max_size=400), start=st.sampled_from([b"", *(item[:30] for item in CAPTURES.values())]))
def test_any_bytes(content: bytes, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(start + content)
    go_all_the_way(path)


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("name", CAPTURES)
def test_captures_with_changed_bytes(name: str, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(CAPTURES[name])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path = tmp_path / "input"
    path.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    go_all_the_way(path)


@FUZZ
@given(data=st.data())
def test_texts_with_parts_removed_doubled_and_changed(data: st.DataObject, tmp_path: Path) -> None:
    content = TEXTS[data.draw(st.sampled_from(sorted(TEXTS)))]
    first, second = sorted((data.draw(st.integers(0, len(content))), data.draw(st.integers(0, len(content)))))
    changed = {
        "removed": content[:first] + content[second:],
        "doubled": content[:second] + content[first:],
        "replaced": content[:first] + data.draw(st.binary(max_size=20)) + content[second:],
        "prompted": b"127.0.0.1:6379> " + data.draw(st.sampled_from([b"slowlog get", b"info", b"latency history x"]))
        + b"\n" + content[first:second],
    }  # fmt: skip
    path = tmp_path / "input"
    path.write_bytes(changed[data.draw(st.sampled_from(sorted(changed)))])
    go_all_the_way(path)


@FUZZ
@given(st.text(alphabet='0123456789)(,"\\ \n>[]xn.:#-', max_size=200))
def test_texts_that_nearly_are_replies(text: str) -> None:
    for part in sections(text):
        for reply in parse(part.lines):
            assert isinstance(reply.value, list)


@FUZZ
@given(content=st.binary(max_size=300), start=st.sampled_from([item[:44] for item in CAPTURES.values()]))
def test_frames_lie_in_their_piece(content: bytes, start: bytes) -> None:
    capture = Capture(io.BytesIO(start + content))
    try:
        for frames in capture.frames():
            assert (frames.captured >= 0).all()
            assert (frames.start + frames.captured <= len(frames.data)).all()
    except StallscopeError as error:
        message = str(error)
        assert message == "it is not a capture"


@FUZZ
@given(data=st.data())
def test_recordings_of_imports_with_any_numbers_in_their_rows(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "input.pcap"
    path.write_bytes(CAPTURES["pcap"])
    storm = add_storm(Builder(), 1000).write(tmp_path / "storm.stall", 4000)
    run_import([path], storm, tmp_path / "all.stall", force=True)
    log = tmp_path / "log.json"
    log.write_text('[[1, 1750000001, 5000, ["get", "x"]]]')
    run_import([log], tmp_path / "all.stall", tmp_path / "both.stall", force=True)
    recording = read_recording(tmp_path / "both.stall")
    events = np.zeros(recording.table.num_rows, EVENT)
    for name in recording.table.column_names:
        values = recording.table[name].to_numpy()
        if name.startswith("value"):
            events["value"][:, int(name[-1])] = values
        else:
            events[name] = values
    for _ in range(data.draw(st.integers(1, 10))):
        row = len(events) - 1 - data.draw(st.integers(0, 10))
        name = data.draw(st.sampled_from(["start_ns", "duration_ns", "tid", "probe", "value", "stack"]))
        bits = 8 * min(EVENT[name].itemsize, 8) - (name == "stack")
        events[name][row] = data.draw(st.integers(0, 2**bits - 1))
    with RecordingWriter(tmp_path / "odd.stall", recording.manifest) as writer:
        writer.write(events)
    summary = summarise(analyse(read_recording(tmp_path / "odd.stall")))
    json.dumps(summary.to_json(), allow_nan=False)


@pytest.mark.parametrize("name", CAPTURES)
def test_the_unchanged_captures_go_all_the_way(name: str, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(CAPTURES[name])
    assert go_all_the_way(path)


@pytest.mark.parametrize("name", [name for name in TEXTS if not name.startswith("empty")])
def test_the_unchanged_texts_go_all_the_way(name: str, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(TEXTS[name])
    assert go_all_the_way(path)
