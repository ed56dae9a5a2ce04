"""Questions about the engine's records, and the callers that wait for the answers."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable

import msgspec

from engine.shared.messages import ToEngine
from engine.shared.records import Answer, Question, ReadFailed
from server.http.errors import APIError, ServerError

MAX_QUESTIONS = 4  # that the engine has at a time: it answers all that it has before its next step


class RecordQuestions:
    """Asks the engine, and hands each answer to the caller that waits for it."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self.clock_offset = time.time() - time.monotonic()  # Unix time of the engine's times
        self.num_steps = 0  # that the engine has reported: while it grows, there is something new to ask for
        self._send = send
        self._slots = asyncio.Semaphore(MAX_QUESTIONS)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}

    async def ask(self, question: Question) -> Answer:
        """Return the engine's answer. Raises ServerError if it cannot answer, or the error passed to `fail`."""
        async with self._slots:
            number = next(self._numbers)
            answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            self._waiting[number] = answer
            try:
                self._send(msgspec.structs.replace(question, read_id=number))
                return await answer
            finally:
                del self._waiting[number]

    def finish(self, answer: Answer) -> None:
        """Hand over an answer, unless nobody waits for it any more."""
        waiting = self._waiting.get(answer.read_id)
        if waiting is None or waiting.done():
            return
        if isinstance(answer, ReadFailed):
            waiting.set_exception(ServerError())
        else:
            waiting.set_result(answer)

    def fail(self, error: APIError) -> None:
        """End all questions with `error`."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
