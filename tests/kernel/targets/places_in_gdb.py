"""Runs inside gdb: stops a process at random places and writes down where each was, as gdb sees it.

For each place one line of JSON: the registers, the top of the stack as /proc/PID/mem gives it, and gdb's
frames. Configured by the environment: PLACES_PID, PLACES_COUNT, PLACES_SEED, PLACES_OUTPUT, PLACES_BELOW
(bytes below the stack pointer) and PLACES_SIZE (bytes from it upwards).
"""

import base64
import json
import os
import random
import re
import subprocess
from pathlib import Path

import gdb

REGISTERS = ("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16)), "rip")
WORD = (1 << 64) - 1

pid = int(os.environ["PLACES_PID"])
count = int(os.environ["PLACES_COUNT"])
below, size = int(os.environ["PLACES_BELOW"]), int(os.environ["PLACES_SIZE"])
chance = random.Random(int(os.environ["PLACES_SEED"]))

for setting in (
    "pagination off",
    "confirm off",
    "backtrace past-main on",
    "backtrace past-entry on",
    "backtrace limit 1000",
    "auto-solib-add on",
    "debuginfod enabled off",
):
    gdb.execute(f"set {setting}", to_string=True)
gdb.execute("handle SIGINT stop nopass", to_string=True)
gdb.execute("handle SIGPIPE SIGUSR1 SIGALRM nostop noprint pass", to_string=True)
gdb.execute(f"attach {pid}", to_string=True)
# Single steps move this thread alone.
gdb.execute("set scheduler-locking step", to_string=True)
memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)


def main_thread():
    return next(thread for thread in gdb.selected_inferior().threads() if thread.ptid[1] == pid)


def function_start(place):
    """Return where the function around an address starts, by any of its names, 0 when gdb knows none."""
    known = re.match(r"\S+(?: \+ (\d+))? in section", gdb.execute(f"info symbol {place}", to_string=True))
    return place - int(known[1] or 0) if known else 0


def frames():
    """Return (address, name, start of the function) of each frame, and why there are no more."""
    found, frame, is_exact = [], gdb.newest_frame(), True
    while frame is not None:
        # Inlined functions and tail calls are gdb's reconstruction: they have no address of their own.
        if frame.type() in (gdb.NORMAL_FRAME, gdb.SIGTRAMP_FRAME):
            found.append((frame.pc(), frame.name() or "", function_start(frame.pc() - (not is_exact))))
            is_exact = frame.type() == gdb.SIGTRAMP_FRAME
        last, frame = frame, frame.older()
    return found, gdb.frame_stop_reason_string(last.unwind_stop_reason())


with Path(os.environ["PLACES_OUTPUT"]).open("w") as output:
    for _ in range(count):
        interrupter = subprocess.Popen(["sh", "-c", f"sleep 0.{chance.randrange(2, 40):03d}; kill -INT {pid}"])
        gdb.execute("continue", to_string=True)
        interrupter.wait()
        main_thread().switch()
        steps = chance.choice((0, 1, 2, 5, chance.randrange(10, 400)))
        if steps:
            gdb.execute(f"stepi {steps}", to_string=True)
            main_thread().switch()
        newest = gdb.newest_frame()
        registers = [int(newest.read_register(name)) & WORD for name in REGISTERS]
        stack = os.pread(memory, below + size, registers[REGISTERS.index("rsp")] - below)
        found, stopped = frames()
        place = {
            "registers": registers,
            "stack": base64.b64encode(stack).decode(),
            "frames": found,
            "stopped": stopped,
        }
        output.write(json.dumps(place) + "\n")
        output.flush()
gdb.execute("detach", to_string=True)
