#!/usr/bin/env python3
"""bcc's own ring buffer reader with a callback that only counts: the peer of our reader.

usage: bcc_reader.py SOURCE POLL_S FLAG...; each line "COUNT" on stdin reads that many events, after which
it prints {"events", "lost", "cpu_ns"}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from stallscope.tracer.capture.bcc_library import compile_program


def main() -> None:
    source, poll, *flags = sys.argv[1:]
    poll_s = float(poll)
    bpf = compile_program(Path(source).read_text(encoding="utf-8"), flags)
    seen = 0

    def count(context: object, data: object, size: int) -> None:
        nonlocal seen
        seen += 1

    def lost() -> int:
        return int(bpf[b"lost"][0].value)

    bpf[b"events"].open_ring_buffer(count)
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = int(line)
        bpf.attach_raw_tracepoint(tp=b"sys_enter", fn_name=b"produce")
        seen, lost_before = 0, lost()
        print("attached", flush=True)
        began_ns = time.process_time_ns()
        while seen + lost() - lost_before < wanted:
            time.sleep(poll_s)
            bpf.ring_buffer_consume()
        cpu_ns = time.process_time_ns() - began_ns
        bpf.detach_raw_tracepoint(tp=b"sys_enter")
        print(json.dumps({"events": seen, "lost": lost() - lost_before, "cpu_ns": cpu_ns}), flush=True)


if __name__ == "__main__":
    main()
