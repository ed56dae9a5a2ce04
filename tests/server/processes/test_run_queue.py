"""Tests of the time that processes wait for a CPU, with real processes."""

import os
import subprocess
import sys
import time

from server.processes.run_queue import cpu_waits, longest_wait

BUSY = "import os; os.sched_setaffinity(0, {%d}); print(flush=True)\nwhile True: pass"
IDLE = "import time; print(flush=True); time.sleep(60)"


def start(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def waits(process: subprocess.Popen[bytes]) -> float:
    before = cpu_waits(process.pid)
    time.sleep(1)
    return longest_wait(before, cpu_waits(process.pid))


def test_processes_that_share_a_cpu_wait_for_it() -> None:
    busy = BUSY % min(os.sched_getaffinity(0))
    processes = [start(code) for code in (busy, busy, busy, IDLE)]
    try:
        assert waits(processes[0]) > 0.3
        assert waits(processes[-1]) < 0.1
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert cpu_waits(processes[0].pid) == {}


def test_threads_that_have_begun_or_ended_meanwhile() -> None:
    assert longest_wait({1: 5.0, 2: 1.0}, {2: 1.5, 3: 100.0}) == 0.5
    assert longest_wait({}, {}) == 0.0
