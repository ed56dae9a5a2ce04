"""Client of the grammar checker process, which is started when the first grammar is checked."""

import asyncio
import hashlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from engine.grammar.checker import LENGTH, MAX_PROCESSOR_SECONDS, CheckerVocabulary, CheckResult, encode_message
from server.http.errors import EngineUnavailableError, QueueFullError
from server.tenants import ANYBODY, Tenant
from server.text.turns import Turns

logger = logging.getLogger(__name__)

MAX_WAITING_SECONDS = 60.0  # for one answer of the process, on a machine that is busy with other things
MAX_WAITING = 64  # requests of a tenant whose grammars wait to be checked
MAX_CACHED_RESULTS = 1024
COMMAND = (sys.executable, "-P", "-m", "engine.grammar.checker")
UNSUITABLE = "this model's kind of tokenizer does not support constrained answers"


@dataclass(frozen=True, slots=True)
class GrammarProblem:
    """The reason why a grammar of a request cannot be followed."""

    index: int  # of the grammar in the request
    message: str  # may be shown to clients


class GrammarChecker:
    """Checks the grammars of one request at a time in another process, and caches the latest results."""

    def __init__(self, tokenizer: str, eos_token_ids: Sequence[int]) -> None:
        """Prepare the checker. `tokenizer` is the content of a tokenizer.json."""
        self._vocabulary = CheckerVocabulary(tokenizer, list(eos_token_ids))
        self._results: OrderedDict[bytes, GrammarProblem | None] = OrderedDict()  # by hash of the grammars
        self._turns = Turns(1)
        self._process: Process | None = None
        self._num_waiting: Counter[str] = Counter()  # by the tenant's name
        self._is_closed = False

    async def find_problem(self, grammars: Sequence[str], tenant: Tenant = ANYBODY) -> GrammarProblem | None:
        """Return the problem of the first of a request's grammars that cannot be followed, or None if all can.

        Raises QueueFullError or EngineUnavailableError.
        """
        # An exchange is completed even if the client disconnects: its answer must not be taken for the next one's.
        return await asyncio.shield(self._find_problem(grammars, tenant))

    async def close(self) -> None:
        """End the process. Later checks raise EngineUnavailableError."""
        self._is_closed = True
        await self._end()

    async def _find_problem(self, grammars: Sequence[str], tenant: Tenant) -> GrammarProblem | None:
        key = hashlib.sha256(msgspec.json.encode(grammars)).digest()
        if key in self._results:
            return self._cached(key)
        if self._num_waiting[tenant.name] >= MAX_WAITING:
            raise QueueFullError(retry_after=MAX_WAITING * MAX_PROCESSOR_SECONDS)
        self._num_waiting[tenant.name] += 1
        try:
            async with self._turns.turn(tenant):
                if key not in self._results:
                    self._results[key] = await self._check(grammars)
                return self._cached(key)
        finally:
            self._num_waiting -= Counter([tenant.name])  # which drops names that have none left

    def _cached(self, key: bytes) -> GrammarProblem | None:
        """Return a cached result, which becomes the latest one."""
        self._results.move_to_end(key)
        if len(self._results) > MAX_CACHED_RESULTS:
            self._results.popitem(last=False)
        return self._results[key]

    async def _check(self, grammars: Sequence[str]) -> GrammarProblem | None:
        """Check the grammars, in a new process if the old one is gone. Raises EngineUnavailableError."""
        for _ in range(2):
            if self._is_closed:
                break
            try:
                return await self._check_once(grammars)
            except (OSError, EOFError, TimeoutError) as error:
                logger.warning("the grammar checker process is gone: %r", error)
                await self._end()  # a late answer would be taken for that to the next check
        raise EngineUnavailableError("The grammar checker is unavailable. Please retry later.")

    async def _check_once(self, grammars: Sequence[str]) -> GrammarProblem | None:
        """Raise OSError, EOFError or TimeoutError if the process has ended or hangs."""
        async with asyncio.timeout(MAX_WAITING_SECONDS):
            if self._process is None and (message := await self._start()) is not None:
                return GrammarProblem(0, message)
            return await self._exchange(grammars)

    async def _start(self) -> str | None:
        """Start the process. Return why no grammar can be followed, or None."""
        self._process = await asyncio.create_subprocess_exec(*COMMAND, stdin=PIPE, stdout=PIPE)
        problem = await self._exchange(self._vocabulary)
        if problem is None:
            return None
        logger.warning("answers cannot be constrained: %s", problem.message)
        await self._end()
        return UNSUITABLE

    async def _exchange(self, message: Sequence[str] | CheckerVocabulary) -> GrammarProblem | None:
        """Send a message and read the result. Raises OSError or EOFError."""
        assert self._process is not None
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(encode_message(message))
        await stdin.drain()
        (length,) = LENGTH.unpack(await stdout.readexactly(LENGTH.size))
        result = msgspec.json.decode(await stdout.readexactly(length), type=CheckResult)
        return None if result is None else GrammarProblem(*result)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        if process.returncode is None:
            # Process.kill() polls the process, which could reap its exit code before the event loop does.
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await process.wait()
