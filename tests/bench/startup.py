"""Measure how long `lightwell serve` takes to its first token, beside a bare `import torch`, and print a table.

    python -m tests.bench.startup [MODEL] [--rounds N] [-- FLAGS OF lightwell serve]

A round starts `python -c "import torch"` and then the server, whose port is asked for a completion of one token every
few milliseconds until it answers. Before the first round the server is started once: that compiles the kernels and
the byte code, and reads the files into the page cache. On a busy machine, compare processor times, not the clock's.
"""

import contextlib
import http.client
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import psutil

from tests.bench.serve import LIGHTWELL, READY_SECONDS, free_port, parse, print_rows, run

MODEL = "smollm2-135m"
BODY = json.dumps({"model": "m", "prompt": "Once upon a time", "max_tokens": 1})
POLL_SECONDS = 0.005
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

Times = dict[str, float]  # seconds by what they end with or are spent on


def main() -> int:
    arguments = parse("startup", __doc__, model=MODEL, rounds=(7, "number of measured starts"))
    measure_server(arguments.model, arguments.flags)
    rounds: list[Times] = []
    for number in range(arguments.rounds):
        times = measure_import() | measure_server(arguments.model, arguments.flags)
        times["ratio: first token to import torch"] = times["first token"] / times["import torch"]
        times["ratio: processor time of the engine"] = times["processor: engine"] / times["processor: import torch"]
        rounds.append(times)
        print(f"round {number + 1}: first token after {times['first token']:.2f} s", file=sys.stderr)
    columns = {name: [times[name] for times in rounds if name in times] for name in rounds[0]}
    rows = [(name, *(f"{some(each):.2f}" for some in (statistics.median, min, max))) for name, each in columns.items()]
    print_rows(("", "median", "least", "most"), rows)
    return 0


def measure_import() -> Times:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import torch"], env=ENVIRONMENT, check=True)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"import torch": seconds, "processor: import torch": processor}


def measure_server(model: str, flags: list[str]) -> Times:
    """Start a server, wait for its first token, and stop it. Raises RuntimeError if it exits or is never ready."""
    port = free_port()
    command = [LIGHTWELL, "serve", model, f"--port={port}", "--served-model-name=m", *flags]
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
        try:
            times = wait_for_token(port, process, began) | processor_times(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
        log.seek(0)
        return times | engine_times(log.read())


def wait_for_token(port: int, process: "subprocess.Popen[bytes]", began: float) -> Times:
    """Ask for a token until there is one. Return when the port answered, and when the token came."""
    times: Times = {}
    while (status := ask(port)) != 200:
        seconds = time.monotonic() - began
        if status is not None:
            times.setdefault("port answers", seconds)
        if status not in (None, 503) or process.poll() is not None or seconds > READY_SECONDS:
            raise RuntimeError(f"no token after {seconds:.1f} s: status {status}, exit code {process.poll()}")
        time.sleep(POLL_SECONDS)
    return times | {"first token": time.monotonic() - began}


def ask(port: int) -> int | None:
    """Return the status of a request for one token, None if the port is closed."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        try:
            connection.request("POST", "/v1/completions", BODY, {"Content-Type": "application/json"})
            return connection.getresponse().status
        except OSError:
            return None


def processor_times(supervisor: int) -> Times:
    """Return the processor time that the engine, the API process and the supervisor have taken until now."""
    parent = psutil.Process(supervisor)
    processes = {"serve": parent}
    for child in parent.children():
        processes["engine" if "engine.process" in child.cmdline() else "API"] = child
    return {f"processor: {name}": sum(each.cpu_times()[:2]) for name, each in sorted(processes.items())}


def engine_times(log: bytes) -> Times:
    """Return the time that the engine logs when it is ready, from its own start on."""
    found = re.search(rb"engine: ready after ([\d.]+) s", log)
    return {"engine ready": float(found[1])} if found else {}


if __name__ == "__main__":
    run(main)
