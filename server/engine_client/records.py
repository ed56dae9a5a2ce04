"""Questions about the engine's records, and the callers that wait for the answers."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable

import msgspec

from engine.shared.messages import ToEngine
from engine.shared.records import Answer, Inspect, Question, ReadFailed, StopReading
from server.http.errors import APIError, QueueFullError, ServerError

MAX_QUESTIONS = 4  # that the engine has at a time, since they delay its steps
MAX_WAITING = 64  # more than there are streams of steps
TOO_MANY = "Too many clients ask what the engine does. Please retry later."


class RecordQuestions:
    """Asks the engine, and hands each answer to the caller that waits for it.

    The engine has a question until it has answered it: also one whose caller is gone.
    """

    def __init__(self, send: Callable[[ToEngine], None], check_ready: Callable[[], None]) -> None:
        """`check_ready` raises APIError unless the engine can answer. When it no longer can, `fail` must be called."""
        self.clock_offset = time.time() - time.monotonic()  # Unix time of the engine's times
        self.num_steps = 0  # that the engine has reported: while it grows, there is something new to ask for
        self._send = send
        self._check_ready = check_ready
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._waiting: dict[asyncio.Future[Answer], Question] = {}  # the next ones first

    @property
    def has_room(self) -> bool:
        """True if another question may wait."""
        return len(self._waiting) < MAX_WAITING

    async def ask(self, question: Question) -> Answer:
        """Return the engine's answer.

        Raises QueueFullError if too many questions wait, ServerError if the engine fails to answer, the error of
        `check_ready`, or the one passed to `fail`.
        """
        self._check_ready()
        if not self.has_room:
            raise QueueFullError(1, TOO_MANY)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[answer] = question
        self._send_next()
        try:
            return await answer
        except asyncio.CancelledError:
            self._stop(answer, question)
            raise
        finally:
            self._waiting.pop(answer, None)

    def _stop(self, answer: asyncio.Future[Answer], question: Question) -> None:
        """Tell the engine that nobody waits for an answer that may take it long."""
        numbers = [number for number, asked in self._asked.items() if asked is answer]
        if numbers and isinstance(question, Inspect):
            self._send(StopReading(numbers[0]))

    def finish(self, answer: Answer) -> None:
        """Hand over an answer, unless nobody waits for it any more, and ask the next question."""
        asked = self._asked.pop(answer.read_id, None)
        if asked is None:
            return
        self._send_next()
        if asked.done():
            return
        if isinstance(answer, ReadFailed):
            asked.set_exception(ServerError())
        else:
            asked.set_result(answer)

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
                self._send(msgspec.structs.replace(question, read_id=number))
