"""Questions to an engine about its inside, and the callers that wait for the answers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from typing import TypeVar

import msgspec

from engine.parts.inspection import records
from engine.shared.messages import Answer, Ask, StopAsking
from server.engine_client.connected_engine import ConnectedEngine
from server.http.errors import APIError, QueueFullError, ServerError

logger = logging.getLogger(__name__)

MAX_QUESTIONS = 4  # that the engine has at a time, since they delay its steps
MAX_WAITING = 64  # more than there are streams of steps

A = TypeVar("A", bound=records.Answer)

TOO_MANY = "Too many clients ask what the engine does. Please retry later."


class RecordQuestions:
    """Asks the engine, and hands each answer to the caller that waits for it.

    The engine has a question until it has answered it: also one whose caller is gone.
    """

    def __init__(self, engine: ConnectedEngine) -> None:
        self.clock_offset = time.time() - time.monotonic()  # Unix time of the engine's times
        self._engine = engine
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._waiting: dict[asyncio.Future[bytes], records.Question] = {}  # the next ones first

    @property
    def has_room(self) -> bool:
        """True if another question may wait."""
        return len(self._waiting) < MAX_WAITING

    async def ask(self, question: records.Question, kind: type[A]) -> A:
        """Return the engine's answer, which is of this kind.

        Raises QueueFullError if too many questions wait, ServerError if the engine fails to answer, the error passed to
        `fail`, or EngineUnavailableError.
        """
        self._engine.liveness.check_ready()
        if not self.has_room:
            raise QueueFullError(1, TOO_MANY)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[answer] = question
        self._send_next()
        try:
            return msgspec.msgpack.decode(await answer, type=kind)
        except msgspec.MsgspecError:
            logger.exception("an answer of the engine cannot be read")
            raise ServerError from None
        except asyncio.CancelledError:
            self._stop(answer, question)
            raise
        finally:
            self._waiting.pop(answer, None)

    def _stop(self, answer: asyncio.Future[bytes], question: records.Question) -> None:
        """Tell the engine that nobody waits for an answer that may take it long."""
        numbers = [number for number, asked in self._asked.items() if asked is answer]
        if numbers and isinstance(question, records.Inspect):
            self._engine.send(StopAsking(numbers[0]))

    def finish(self, answer: Answer) -> None:
        """Hand over an answer, unless nobody waits for it any more, and ask the next question."""
        asked = self._asked.pop(answer.number, None)
        if asked is None:
            return
        self._send_next()
        if asked.done():
            return
        if answer.answer is None:
            asked.set_exception(ServerError())
        else:
            asked.set_result(answer.answer)

    def fail(self, error: APIError) -> None:
        """End all questions with `error`, those that wait, too."""
        for answer in (*self._asked.values(), *self._waiting):
            if not answer.done():
                answer.set_exception(error)
        self._asked.clear()
        self._waiting.clear()

    def _send_next(self) -> None:
        """Send questions while the engine has few. Those of callers that are gone are left out."""
        while self._waiting and len(self._asked) < MAX_QUESTIONS:
            answer = next(iter(self._waiting))
            question = self._waiting.pop(answer)
            if not answer.done():
                number = next(self._numbers)
                self._asked[number] = answer
                self._engine.send(Ask(number, msgspec.msgpack.encode(question)))


def questions_to(engine: ConnectedEngine) -> RecordQuestions:
    """Return what asks an engine."""
    if engine.asker is None:
        engine.asker = RecordQuestions(engine)
    asker: RecordQuestions = engine.asker
    return asker
