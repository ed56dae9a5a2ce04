"""Client of the grammar process, which is started for the first request whose answer is constrained."""

import asyncio
import hashlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from contextlib import suppress

import msgspec

from engine.shared.recently_used import RecentlyUsed
from server.constrained.messages import (
    LENGTH,
    Grammar,
    GrammarAnswer,
    GrammarProblem,
    GrammarRequest,
    GrammarVocabulary,
)
from server.http.errors import EngineUnavailableError, InvalidValueError, QueueFullError
from server.schemas.generation_request import GenerationRequest
from server.tenants import ANYBODY, Tenant
from server.text.text_threads import Turns

logger = logging.getLogger(__name__)

MAX_WAITING_SECONDS = 60.0  # for one answer of the process, on a machine that is busy with other things
MAX_WAITING = 64  # requests of a tenant that wait for their turn
MAX_CACHED_BYTES = 16 << 20
BYTES_OF_A_RESULT = 1024  # beside its texts
COMMAND = (sys.executable, "-P", "-m", "server.constrained.process")
UNSUITABLE = "This model's kind of tokenizer does not support constrained answers."

# Parameters that could forbid every token that a grammar allows.
EXCLUSIVE = ("allowed_token_ids", "bad_words")

Result = Grammar | GrammarProblem


class GrammarProcess:
    """Makes the grammar of one request at a time in another process, and keeps the latest results."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._vocabulary = vocabulary
        self._results = RecentlyUsed[bytes, Result](MAX_CACHED_BYTES)  # by hash of the request
        self._turns = Turns(1)
        self._process: Process | None = None
        self._exchange: asyncio.Task[Result] | None = None  # what uses the process
        self._num_waiting: Counter[str] = Counter()  # by the tenant's name
        self._is_closed = False
        self._is_suitable = True  # the vocabulary

    async def make(self, request: bytes, body: GenerationRequest, tenant: Tenant = ANYBODY) -> Grammar:
        """Return the grammar for a request, which `encode_request` made of `body`. Takes up to a second.

        Raises:
            InvalidValueError: the engine cannot follow it, or a parameter is not allowed together with it.
            QueueFullError: too many requests of the tenant wait.
            EngineUnavailableError: the process does not answer.
        """
        result = await self.find(request, tenant)
        if isinstance(result, GrammarProblem):
            param = result.param or msgspec.json.decode(request, type=GrammarRequest).param
            raise InvalidValueError(result.message, param=param, code=result.code)
        for name in EXCLUSIVE:
            if getattr(body, name, None):
                message = f"Invalid '{name}': not allowed with '{result.param}'."
                raise InvalidValueError(message, param=name)
        return result

    async def find(self, request: bytes, tenant: Tenant = ANYBODY) -> Result:
        """Return the answer to a request. Raises QueueFullError or EngineUnavailableError."""
        if not self._is_suitable:
            return GrammarProblem(UNSUITABLE)
        key = hashlib.sha256(request).digest()
        if (known := self._results.get(key)) is not None:
            return known
        if self._num_waiting[tenant.name] >= MAX_WAITING:
            raise QueueFullError(retry_after=MAX_WAITING)
        self._num_waiting[tenant.name] += 1
        task = asyncio.create_task(self._find(key, request, tenant))
        task.add_done_callback(lambda task: self._leave(tenant, task))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Only an exchange is completed: its answer must not be taken for the next one's.
            if task is not self._exchange:
                task.cancel()
            raise

    async def close(self) -> None:
        """End the process. Later requests raise EngineUnavailableError."""
        self._is_closed = True
        await self._end()
        if self._exchange is not None:
            await asyncio.wait((self._exchange,))

    async def _find(self, key: bytes, request: bytes, tenant: Tenant) -> Result:
        """Return the answer to a request when it is the tenant's turn."""
        async with self._turns.turn(tenant):
            if (known := self._results.get(key)) is not None:
                return known
            self._exchange = asyncio.current_task()
            result = await self._answer(request)
            self._results.put(key, result, _num_bytes(result))
            return result

    def _leave(self, tenant: Tenant, task: asyncio.Task[Result]) -> None:
        if not task.cancelled():
            task.exception()  # that of a request whose client has gone is of interest to nobody
        self._num_waiting -= Counter([tenant.name])  # which drops names that have none left

    async def _answer(self, request: bytes) -> Result:
        """Ask the process, or a new one if the old one is gone. Raises EngineUnavailableError."""
        for _ in range(2):
            if self._is_closed:
                break
            try:
                return await self._ask(request)
            except (OSError, EOFError, TimeoutError) as error:
                logger.warning("the grammar process is gone: %r", error)
                await self._end()  # a late answer would be taken for that to the next request
        raise EngineUnavailableError("The grammar process is unavailable. Please retry later.")

    async def _ask(self, request: bytes) -> Result:
        """Raise OSError, EOFError or TimeoutError if the process has ended or hangs."""
        async with asyncio.timeout(MAX_WAITING_SECONDS):
            if self._process is None and (problem := await self._start()) is not None:
                return problem
            answer = await self._send(request)
            assert answer is not None
            return answer

    async def _start(self) -> GrammarProblem | None:
        """Start the process. Return why no answer can be constrained, or None."""
        self._process = await asyncio.create_subprocess_exec(*COMMAND, stdin=PIPE, stdout=PIPE)
        if self._is_closed:
            await self._end()
            raise EOFError
        answer = await self._send(msgspec.json.encode(self._vocabulary))
        if answer is None:
            return None
        assert isinstance(answer, GrammarProblem)
        logger.warning("answers cannot be constrained: %s", answer.message)
        await self._end()
        self._is_suitable = False
        return GrammarProblem(UNSUITABLE)

    async def _send(self, message: bytes) -> GrammarAnswer:
        """Send a message and read the answer. Raises OSError or EOFError."""
        assert self._process is not None
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(LENGTH.pack(len(message)) + message)
        await stdin.drain()
        (length,) = LENGTH.unpack(await stdout.readexactly(LENGTH.size))
        answer: GrammarAnswer = msgspec.json.decode(await stdout.readexactly(length), type=GrammarAnswer)
        return answer

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


def _num_bytes(result: Result) -> int:
    return BYTES_OF_A_RESULT + len(result.text if isinstance(result, Grammar) else result.message)
