"""Whether a grammar can be followed, found out in a process of its own: some take a compiler very long, or crash it.

The process reads the vocabulary when the first grammar comes. For each request it forks another, which may take so much
time and memory.
"""

import asyncio
import hashlib
import logging
import mmap
import os
import resource
import signal
import struct
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from engine.grammar import GrammarCompiler, GrammarError
from engine.lifeline import die_with_parent

logger = logging.getLogger(__name__)

MAX_PROCESSOR_SECONDS = 0.6  # for the grammars of one request; most take a few milliseconds
MAX_WAITING_SECONDS = 60.0  # on a machine that is busy with other things
MAX_DATA_BYTES = 2 << 30  # that the process may take
NUM_KEPT_VERDICTS = 1024
COMMAND = (sys.executable, "-P", "-m", "server.grammar_judge")
TOO_SLOW = "following it takes too long"
CRASHED = "it cannot be compiled"
UNSUITABLE = "the tokenizer of this model is of a kind that cannot be constrained"

_PLACE = struct.Struct("<I")
_LENGTH = struct.Struct("<I")  # what each message of the two processes begins with


class _Vocabulary(msgspec.Struct):
    """The first message, which is answered as if it were a grammar."""

    tokenizer: str
    eos_token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Problem:
    index: int  # of the grammar among those of the request
    message: str  # fit for the client that sent it


_Verdict = tuple[int, str] | None  # a Problem, in a message


class GrammarJudge:
    """Judges one request's grammars at a time, and remembers the last verdicts."""

    def __init__(self, tokenizer: str, eos_token_ids: Sequence[int]) -> None:
        """`tokenizer` is the text of a tokenizer.json."""
        self._vocabulary = _Vocabulary(tokenizer, list(eos_token_ids))
        self._verdicts: OrderedDict[bytes, Problem | None] = OrderedDict()
        self._lock = asyncio.Lock()
        self._process: Process | None = None

    async def problem(self, grammars: Sequence[str]) -> Problem | None:
        """What is wrong with the first of a request's grammars that cannot be followed."""
        # What was begun is finished, also for a client that goes away: each answer belongs to one question.
        return await asyncio.shield(self._problem(grammars))

    async def close(self) -> None:
        """End the process. Nothing is judged after."""
        async with self._lock:
            await self._end()

    async def _problem(self, grammars: Sequence[str]) -> Problem | None:
        key = hashlib.sha256(msgspec.json.encode(grammars)).digest()
        async with self._lock:
            if key not in self._verdicts:
                self._verdicts[key] = await self._ask(grammars)
            self._verdicts.move_to_end(key)
            if len(self._verdicts) > NUM_KEPT_VERDICTS:
                self._verdicts.popitem(last=False)
            return self._verdicts[key]

    async def _ask(self, grammars: Sequence[str]) -> Problem | None:
        try:
            return await self._ask_once(grammars)
        except (OSError, EOFError, TimeoutError) as error:
            logger.warning("the process that judges grammars is gone: %r", error)
            await self._end()
            return await self._ask_once(grammars)

    async def _ask_once(self, grammars: Sequence[str]) -> Problem | None:
        """Raises OSError, EOFError or TimeoutError where the process has ended or is stuck."""
        async with asyncio.timeout(MAX_WAITING_SECONDS):
            if self._process is None and (message := await self._start()) is not None:
                return Problem(0, message)
            return await self._exchange(grammars)

    async def _start(self) -> str | None:
        """Why no grammar can be followed."""
        self._process = await asyncio.create_subprocess_exec(*COMMAND, stdin=PIPE, stdout=PIPE)
        problem = await self._exchange(self._vocabulary)
        if problem is None:
            return None
        logger.warning("answers cannot be constrained to a form: %s", problem.message)
        await self._end()
        return UNSUITABLE

    async def _exchange(self, message: Sequence[str] | _Vocabulary) -> Problem | None:
        """Raises OSError or EOFError."""
        assert self._process is not None
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(_framed(message))
        await stdin.drain()
        (length,) = _LENGTH.unpack(await stdout.readexactly(_LENGTH.size))
        verdict = msgspec.json.decode(await stdout.readexactly(length), type=_Verdict)
        return None if verdict is None else Problem(*verdict)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        # Process.kill() could take the exit code away from the event loop.
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()


def _framed(message: object) -> bytes:
    content = msgspec.json.encode(message)
    return _LENGTH.pack(len(content)) + content


def main() -> None:
    """The process: a vocabulary and then grammars on standard input, a verdict about each on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the parent decides what it means
    die_with_parent(os.getppid())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, verdicts = sys.stdin.buffer, sys.stdout.buffer
    vocabulary = msgspec.json.decode(_read(requests), type=_Vocabulary)
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
            _write(verdicts, _judge(compiler, grammars, place))
            os._exit(0)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if exit_code != 0:
            (index,) = _PLACE.unpack(place[:])
            _write(verdicts, (index, TOO_SLOW if exit_code == -signal.SIGPROF else CRASHED))


def _judge(compiler: GrammarCompiler, grammars: Sequence[str], place: mmap.mmap) -> _Verdict:
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
    head = stream.read(_LENGTH.size)
    return stream.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""


def _write(stream: BinaryIO, verdict: _Verdict) -> None:
    stream.write(_framed(verdict))
    stream.flush()


if __name__ == "__main__":
    main()
