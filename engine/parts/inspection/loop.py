"""Answers questions about the inside of the engine between the steps of its loop."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from engine.parts.inspection.inspector import Inspector
from engine.parts.inspection.reader import RecordReader
from engine.parts.inspection.recorder import Recorder
from engine.parts.inspection.records import Inspect, Question, RecordQuestion
from engine.shared.messages import Answer, Ask, StopAsking

if TYPE_CHECKING:
    from engine.process import EngineLoop

logger = logging.getLogger("lightwell.engine")

MAX_QUESTIONS = 64  # that wait; an API process has a few at a time


class Questions:
    """The part of the loop that answers questions. Each takes up to some milliseconds, so a step follows each."""

    def __init__(self, loop: EngineLoop) -> None:
        engine = loop.engine
        self.loop = loop
        recorder = Recorder(engine.scheduler, keeps_tokens=engine.keeps_token_ids)
        engine.on_step.append(recorder.add_step)
        self.reader = RecordReader(recorder, caches_prefixes=engine.enable_prefix_caching)
        self.inspector = Inspector(engine, recorder)
        self.decoder: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)

    def ask(self, identity: bytes, message: Ask) -> None:
        """Queue a question about the records, unless too many wait, or begin an inspection after the next step."""
        try:
            question = self.decoder.decode(message.question)
        except Exception:
            logger.exception("a question cannot be read")
            self._reply(identity, message.number, None)
            return
        if isinstance(question, Inspect):
            if (refusal := self.inspector.begin(identity, message.number, question)) is None:
                self.loop.after_step.append(self._advance)
            else:
                self._reply(identity, message.number, refusal)
        elif len(self.loop.queue) >= MAX_QUESTIONS:
            self._reply(identity, message.number, None)
        else:
            self.loop.queue.append(partial(self._answer, identity, message.number, question))

    def _answer(self, identity: bytes, number: int, question: RecordQuestion) -> None:
        self._reply(identity, number, self.reader.answer(question))

    def _reply(self, identity: bytes, number: int, answer: object) -> None:
        """Send an answer, or that there is none."""
        encoded = None if answer is None else msgspec.msgpack.encode(answer)
        self.loop.reply(identity, Answer(number, encoded))

    def stop(self, identity: bytes, message: StopAsking) -> None:
        """End an inspection whose answer nobody waits for."""
        if self.inspector.stop(identity, message.number):
            self.loop.after_step.remove(self._advance)
            self._reply(identity, message.number, None)

    def _advance(self, step_seconds: float | None) -> None:
        if (ended := self.inspector.advance_after(step_seconds)) is not None:
            self.loop.after_step.remove(self._advance)
            self._reply(*ended)


def attach(loop: EngineLoop) -> None:
    """Handle the questions about the inside of the engine."""
    questions = Questions(loop)
    loop.handlers |= {Ask: questions.ask, StopAsking: questions.stop}
    loop.not_work |= {Ask}
