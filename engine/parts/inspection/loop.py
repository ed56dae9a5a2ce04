"""Answers questions about the inside of the engine between the steps of its loop."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, get_args

from engine.parts.inspection.inspector import Inspector
from engine.parts.inspection.reader import RecordReader
from engine.shared.records import Inspect, ReadFailed, RecordQuestion, StopReading

if TYPE_CHECKING:
    from engine.process import EngineLoop

MAX_QUESTIONS = 64  # that wait; an API process has a few at a time


class Questions:
    """The part of the loop that answers questions. Each takes up to some milliseconds, so a step follows each."""

    def __init__(self, loop: EngineLoop) -> None:
        engine = loop.engine
        self.loop = loop
        self.reader = RecordReader(engine.recorder, engine.scheduler, caches_prefixes=engine.enable_prefix_caching)
        self.inspector = Inspector(engine)

    def ask(self, identity: bytes, question: RecordQuestion) -> None:
        """Queue a question about the records, unless too many wait."""
        if len(self.loop.queue) >= MAX_QUESTIONS:
            self.loop.connections.send(identity, ReadFailed(question.read_id))
        else:
            self.loop.queue.append(partial(self._answer, identity, question))

    def _answer(self, identity: bytes, question: RecordQuestion) -> None:
        self.loop.reply(identity, self.reader.answer(question))

    def inspect(self, identity: bytes, question: Inspect) -> None:
        """Begin an inspection, which goes on after each step."""
        if (refusal := self.inspector.begin(identity, question)) is not None:
            self.loop.connections.send(identity, refusal)
        else:
            self.loop.after_step.append(self._advance)

    def stop(self, identity: bytes, message: StopReading) -> None:
        """End an inspection whose answer nobody waits for."""
        if (answer := self.inspector.stop(identity, message.read_id)) is not None:
            self.loop.after_step.remove(self._advance)
            self.loop.connections.send(identity, answer)

    def _advance(self, step_seconds: float | None) -> None:
        if (answer := self.inspector.advance_after(step_seconds)) is not None:
            self.loop.after_step.remove(self._advance)
            self.loop.reply(*answer)


def attach(loop: EngineLoop) -> None:
    """Handle the questions about the inside of the engine."""
    questions = Questions(loop)
    for kind in get_args(RecordQuestion):
        loop.handlers[kind] = questions.ask
    loop.handlers |= {Inspect: questions.inspect, StopReading: questions.stop}
    loop.not_work |= {*get_args(RecordQuestion), Inspect}
