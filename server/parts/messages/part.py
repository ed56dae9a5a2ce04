"""Anthropic's messages."""

from functools import reduce
from operator import or_

from server.context import ServerContext
from server.dialect import ID, MESSAGES, MODEL, Dialect, Operation
from server.part import Part
from server.parts.messages.errors import ANTHROPIC_ERRORS, VERSION_HEADER
from server.parts.messages.models import AnthropicModels
from server.parts.messages.routes import router
from server.parts.messages.schemas import (
    AnthropicMessage,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    CountTokensResponse,
    MessageDelta,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputTextBlock,
)

EVENTS = (MessageStart, ContentBlockStart, ContentBlockDelta, ContentBlockStop, MessageDelta, MessageStop)
MESSAGE = AnthropicMessage(
    id=f"msg_{ID}",
    model=MODEL,
    content=[OutputTextBlock("Paris.")],
    stop_reason="end_turn",
    stop_sequence=None,
    usage=MessageUsage(input_tokens=37, cache_read_input_tokens=0, output_tokens=4),
)

ANTHROPIC = Dialect(
    tag="Anthropic",
    routers=[router],
    operations={
        ("/v1/messages", "post"): Operation(
            AnthropicMessage, {"messages": MESSAGES, "max_tokens": 20}, reduce(or_, EVENTS), MESSAGE
        ),
        ("/v1/messages/count_tokens", "post"): Operation(
            CountTokensResponse, {"messages": MESSAGES}, answer_example=CountTokensResponse(37)
        ),
    },
    errors=ANTHROPIC_ERRORS,
    in_workers=True,
)


def _attach(context: ServerContext) -> None:
    context.model_formats[VERSION_HEADER] = AnthropicModels()


PART = Part(dialects=[ANTHROPIC], attach=_attach)
