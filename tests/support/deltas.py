"""Choices and their deltas, for tests of the code that produces and reads them."""

from typing import Any

from engine.shared.messages import TokenLogprobs
from server.generation.choice import ChoiceDelta, ChoiceState, DeltaPart
from server.text.choice_text import ChoiceText
from server.text.parsers.answer_parts import AnswerPart, PartKind
from server.text.tokenizer import Tokenizer

NO_LOGPROBS = TokenLogprobs.pack(-1.0, 1, [], [])


def content(text: str) -> AnswerPart:
    return AnswerPart(PartKind.CONTENT, text)


def reasoning_part(text: str) -> AnswerPart:
    return AnswerPart(PartKind.REASONING, text)


def delta(*parts: DeltaPart, **fields: Any) -> ChoiceDelta:
    """Return a delta of a request's only choice."""
    return ChoiceDelta(0, list(parts), **fields)


def make_choice(
    tokenizer: Tokenizer, *, index: int = 0, stop: list[str] | None = None, include_stop: bool = False
) -> ChoiceState:
    text = ChoiceText(tokenizer, stop=stop or (), include_stop=include_stop, track_offsets=True)
    return ChoiceState(index, text, include_stop=include_stop)
