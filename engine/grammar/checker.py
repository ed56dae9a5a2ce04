"""A process that says whether grammars can be followed: `python -m engine.grammar.checker`.

A `Vocabulary` and then lists of grammars come on standard input, and a verdict about each goes to standard output. For
each list it forks another process, which may take so much time and memory: some grammars take a compiler very long, or
crash it.
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

from engine.grammar.matcher import GrammarCompiler, GrammarError
from engine.shared.parent_death import die_with_parent

MAX_PROCESSOR_SECONDS = 0.6  # for the grammars of one request; most take a few milliseconds
MAX_DATA_BYTES = 2 << 30
TOO_SLOW = "following it takes too long"
CRASHED = "it cannot be compiled"

LENGTH = struct.Struct("<I")  # what each message begins with
_PLACE = struct.Struct("<I")

Verdict = tuple[int, str] | None  # which grammar of the list cannot be followed, and why, fit for a client


class JudgedVocabulary(msgspec.Struct):
    """The first message, which is answered as if it were a grammar."""

    tokenizer: str  # the text of a tokenizer.json
    eos_token_ids: list[int]


def framed(message: object) -> bytes:
    """As both processes send it."""
    content = msgspec.json.encode(message)
    return LENGTH.pack(len(content)) + content


def main() -> None:
    """Until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the parent decides what it means
    die_with_parent(os.getppid())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, verdicts = sys.stdin.buffer, sys.stdout.buffer
    vocabulary = msgspec.json.decode(_read(requests), type=JudgedVocabulary)
    try:
        compiler = GrammarCompiler(vocabulary.tokenizer, vocabulary.eos_token_ids)
    except ValueError as error:
        _write(verdicts, (0, str(error)))
        return
    _write(verdicts, None)
    place = mmap.mmap(-1, _PLACE.size)  # shared with the processes that are forked
    while request := _read(requests):
        grammars = msgspec.json.decode(request, type=list[str])
        if (process := os.fork()) == 0:
            verdict = _judge(compiler, grammars, place)
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            _write(verdicts, verdict)
            os._exit(0)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if exit_code == -signal.SIGKILL:  # by nothing that the grammar has done
            sys.exit(1)
        if exit_code != 0:
            (index,) = _PLACE.unpack(place[:])
            _write(verdicts, (index, TOO_SLOW if exit_code == -signal.SIGPROF else CRASHED))


def _judge(compiler: GrammarCompiler, grammars: Sequence[str], place: mmap.mmap) -> Verdict:
    """In a process that is there for it alone. `place` says how far it is."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    signal.setitimer(signal.ITIMER_PROF, MAX_PROCESSOR_SECONDS)  # the kernel then ends the process, whatever it does
    for index, grammar in enumerate(grammars):
        place[:] = _PLACE.pack(index)
        try:
            compiler.compile(grammar)
        except GrammarError as error:
            return index, str(error)
    return None


def _read(stream: BinaryIO) -> bytes:
    """A message; empty where the parent has gone."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def _write(stream: BinaryIO, verdict: Verdict) -> None:
    stream.write(framed(verdict))
    stream.flush()


if __name__ == "__main__":
    main()
