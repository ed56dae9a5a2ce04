"""Whether grammars can be followed, found out in a process of its own, which is started when the first one comes."""

import asyncio
import hashlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from engine.grammar.checker import LENGTH, MAX_PROCESSOR_SECONDS, JudgedVocabulary, Verdict, framed
from server.http.errors import EngineUnavailableError, QueueFullError

logger = logging.getLogger(__name__)

MAX_WAITING_SECONDS = 60.0  # on a machine that is busy with other things
MAX_WAITING = 64  # requests whose grammars are not judged yet
NUM_KEPT_VERDICTS = 1024
COMMAND = (sys.executable, "-P", "-m", "engine.grammar.checker")
UNSUITABLE = "the tokenizer of this model is of a kind that cannot be constrained"


@dataclass(frozen=True, slots=True)
class Problem:
    index: int  # of the grammar among those of the request
    message: str  # fit for the client that sent it


class GrammarJudge:
    """Judges one request's grammars at a time, and remembers the last verdicts."""

    def __init__(self, tokenizer: str, eos_token_ids: Sequence[int]) -> None:
        """`tokenizer` is the text of a tokenizer.json."""
        self._vocabulary = JudgedVocabulary(tokenizer, list(eos_token_ids))
        self._verdicts: OrderedDict[bytes, Problem | None] = OrderedDict()
        self._lock = asyncio.Lock()
        self._process: Process | None = None
        self._num_waiting = 0
        self._is_closed = False

    async def problem(self, grammars: Sequence[str]) -> Problem | None:
        """What is wrong with the first of a request's grammars that cannot be followed.

        Raises QueueFullError or EngineUnavailableError.
        """
        # What was begun is finished, also for a client that goes away: each answer belongs to one question.
        return await asyncio.shield(self._problem(grammars))

    async def close(self) -> None:
        """End the process. Nothing is judged after."""
        self._is_closed = True
        await self._end()

    async def _problem(self, grammars: Sequence[str]) -> Problem | None:
        key = hashlib.sha256(msgspec.json.encode(grammars)).digest()
        if key in self._verdicts:
            return self._remembered(key)
        if self._num_waiting >= MAX_WAITING:
            raise QueueFullError(retry_after=self._num_waiting * MAX_PROCESSOR_SECONDS)
        self._num_waiting += 1
        try:
            async with self._lock:
                if key not in self._verdicts:
                    self._verdicts[key] = await self._ask(grammars)
                return self._remembered(key)
        finally:
            self._num_waiting -= 1

    def _remembered(self, key: bytes) -> Problem | None:
        self._verdicts.move_to_end(key)
        if len(self._verdicts) > NUM_KEPT_VERDICTS:
            self._verdicts.popitem(last=False)
        return self._verdicts[key]

    async def _ask(self, grammars: Sequence[str]) -> Problem | None:
        """Raises EngineUnavailableError where the process does not live long enough to answer."""
        for _ in range(2):
            if self._is_closed:
                break
            try:
                return await self._ask_once(grammars)
            except (OSError, EOFError, TimeoutError) as error:
                logger.warning("the process that judges grammars is gone: %r", error)
                await self._end()  # an answer that it still owes would be taken for that to the next question
        raise EngineUnavailableError("Grammars cannot be judged at the moment. Please retry later.")

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

    async def _exchange(self, message: Sequence[str] | JudgedVocabulary) -> Problem | None:
        """Raises OSError or EOFError."""
        assert self._process is not None
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(framed(message))
        await stdin.drain()
        (length,) = LENGTH.unpack(await stdout.readexactly(LENGTH.size))
        verdict = msgspec.json.decode(await stdout.readexactly(length), type=Verdict)
        return None if verdict is None else Problem(*verdict)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        if process.returncode is None:
            # Process.kill() could take the exit code away from the event loop.
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await process.wait()
