"""Makes grammars in another process, forked for each request, so that one that takes too much harms nothing else.

Some schemas, patterns and grammars take very long to convert or to compile, or crash the compiler.
"""

import mmap
import os
import resource
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec

from engine.grammar.compiler import STACK_BYTES
from server.constrained.grammars import CRASHED, TOO_DEEP, GrammarMaker, GrammarVocabulary, Result, problem
from server.http.errors import invalid
from server.part_table import is_installed, load_module
from server.parts.hardening.processes import Processes, open_parent
from server.text.templates.syntaxes import decode_format

COMMAND = (sys.executable, "-P", "-m", "server.parts.hardening.grammar_process")
MAX_PROCESSOR_SECONDS = 0.7  # for one request; most take a few milliseconds
MAX_DATA_BYTES = 2 << 30  # RLIMIT_DATA of the forked process
MAX_PARAM_BYTES = 256
TOO_SLOW = "following it takes too long"

PROBLEM_OF: dict[int, str] = {signal.SIGPROF: TOO_SLOW, signal.SIGSEGV: TOO_DEEP}  # by the signal that ended it


class GrammarProcess:
    """Does what `GrammarMaker` does in a process that is started for the first request."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._processes = Processes(COMMAND, msgspec.json.encode(vocabulary), 1, "grammars")

    def make(self, request: bytes) -> Result:
        """Return the grammar of a request, or why there is none. Raises EngineUnavailableError."""
        _, answer = self._processes.ask(request)
        result: Result = msgspec.json.decode(answer, type=Result)
        return result

    def close(self) -> None:
        self._processes.close()


# A process.


class _SharedParam(GrammarMaker):
    """Notes the field that is to blame if the process dies in memory that it shares with the one it is forked from."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._shared = mmap.mmap(-1, MAX_PARAM_BYTES)
        super().__init__(vocabulary)

    @property
    def param(self) -> str:
        return self._shared[:].rstrip(b"\0").decode(errors="ignore")

    @param.setter
    def param(self, param: str) -> None:
        self._shared[:] = param.encode()[:MAX_PARAM_BYTES].ljust(MAX_PARAM_BYTES, b"\0")


def main() -> None:
    """Make grammars until the socket is closed."""
    with open_parent() as (read, send):
        maker = _SharedParam(msgspec.json.decode(read() or b"", type=GrammarVocabulary))
        with suppress(ValueError):  # which `make` reports
            maker.compiler  # noqa: B018
        # Forked processes find imported what these import.
        decode_format(msgspec.Raw(b"null"))
        if is_installed("structural_tags"):
            load_module("structural_tags", "grammar")
        send(True, b"")
        while (request := read()) is not None:
            if (process := os.fork()) == 0:
                answer = msgspec.json.encode(_make_within_limits(maker, request))
                signal.setitimer(signal.ITIMER_PROF, 0.0)
                send(True, answer)
                os._exit(0)
            exit_code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            if exit_code == -signal.SIGKILL:  # not caused by the request
                sys.exit(1)
            if exit_code != 0:
                error = invalid(maker.param, PROBLEM_OF.get(-exit_code, CRASHED))
                send(True, msgspec.json.encode(problem(error)))


def _make_within_limits(maker: GrammarMaker, request: bytes) -> Result:
    """Answer a request under resource limits, which end the process if exceeded."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    signal.setitimer(signal.ITIMER_PROF, MAX_PROCESSOR_SECONDS)  # SIGPROF then ends the process
    threading.stack_size(STACK_BYTES // 2)  # so that no grammar overflows that of the engine alone
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(maker.make, request).result()


if __name__ == "__main__":
    main()
