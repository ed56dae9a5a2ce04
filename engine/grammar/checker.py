"""The grammar checker, a process that compiles grammars before admission: `python -m engine.grammar.checker`.

It reads a `CheckerVocabulary` and then lists of grammars from standard input, and writes a check result for each to
standard output. Each list is compiled in a forked process with limits on time and memory, because some grammars take
very long to compile, or crash the compiler.
"""

import mmap
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from typing import BinaryIO

import msgspec

from engine.grammar.compiler import GrammarCompiler, GrammarError
from engine.shared.parent_death import die_with_parent

MAX_PROCESSOR_SECONDS = 0.6  # for all grammars of one request; most take a few milliseconds
MAX_DATA_BYTES = 2 << 30  # RLIMIT_DATA of the forked process
TOO_SLOW = "following it takes too long"
CRASHED = "it cannot be compiled"

LENGTH = struct.Struct("<I")  # number of bytes of a message, sent before it
_PROGRESS = struct.Struct("<I")  # index of the grammar that is being compiled

# Index of the first grammar of the list that cannot be followed, and why, in words for the client. None: all can.
CheckResult = tuple[int, str] | None


class CheckerVocabulary(msgspec.Struct):
    """The first message. It is answered with a check result, too."""

    tokenizer: str  # the text of a tokenizer.json
    eos_token_ids: list[int]


def encode_message(message: object) -> bytes:
    """Return a message as both processes send it: its length, then JSON."""
    content = msgspec.json.encode(message)
    return LENGTH.pack(len(content)) + content


def main() -> None:
    """Check grammars until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends this process
    die_with_parent(os.getppid())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, results = sys.stdin.buffer, sys.stdout.buffer
    vocabulary = msgspec.json.decode(_read(requests), type=CheckerVocabulary)
    try:
        compiler = GrammarCompiler(vocabulary.tokenizer, vocabulary.eos_token_ids)
    except ValueError as error:
        _write(results, (0, str(error)))
        return
    _write(results, None)
    progress = mmap.mmap(-1, _PROGRESS.size)  # shared with the forked processes
    while request := _read(requests):
        grammars = msgspec.json.decode(request, type=list[str])
        if (process := os.fork()) == 0:
            result = _check(compiler, grammars, progress)
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            _write(results, result)
            os._exit(0)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if exit_code == -signal.SIGKILL:  # not caused by the grammar
            sys.exit(1)
        if exit_code != 0:
            (index,) = _PROGRESS.unpack(progress[:])
            _write(results, (index, TOO_SLOW if exit_code == -signal.SIGPROF else CRASHED))


def _check(compiler: GrammarCompiler, grammars: Sequence[str], progress: mmap.mmap) -> CheckResult:
    """Compile grammars under resource limits, which end the process if exceeded.

    `progress` receives the index of the grammar that is being compiled.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    signal.setitimer(signal.ITIMER_PROF, MAX_PROCESSOR_SECONDS)  # SIGPROF then ends the process
    for index, grammar in enumerate(grammars):
        progress[:] = _PROGRESS.pack(index)
        try:
            compiler.compile(grammar)
        except GrammarError as error:
            return index, str(error)
    return None


def _read(stream: BinaryIO) -> bytes:
    """Return the next message, or b"" if the parent has closed the stream."""
    length = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(length)[0]) if len(length) == LENGTH.size else b""


def _write(stream: BinaryIO, result: CheckResult) -> None:
    stream.write(encode_message(result))
    stream.flush()


if __name__ == "__main__":
    main()
