"""Conversations that are longer than the context, and whose client agrees that the oldest is left out."""

from bisect import bisect_left
from collections.abc import Sequence

from server.api.chat.prompt import encode_request
from server.api.chat.schemas import ChatCompletionRequest, ChatMessage
from server.context import ServerContext
from server.generation.prompts import Prompt
from server.http.errors import BadRequestError

SYSTEM = ("system", "developer")


def encode_newest(context: ServerContext, body: ChatCompletionRequest) -> Prompt:
    """The prompt without as many of the oldest messages as it takes to fit; messages of the system all stay.

    Where even the last of them is too long, it is the prompt of all: who asks is told its length. Raises
    BadRequestError.
    """
    room = context.max_model_len - (body.max_output_tokens or 1)
    whole = _encode(context, body)
    if whole is not None and len(whole.token_ids) <= room:
        return whole

    def fitting(start: int) -> Prompt | None:
        kept = [message for index, message in enumerate(body.messages) if index >= start or message.role in SYSTEM]
        prompt = _encode(context, body.model_copy(update={"messages": kept}), is_cut=True)
        return prompt if prompt is not None and len(prompt.token_ids) <= room else None

    for starts in _starts(body.messages):
        # What is kept fits from some place on, if the template takes all that begin so.
        first = bisect_left(starts, True, key=lambda start: fitting(start) is not None)
        if first < len(starts) and (prompt := fitting(starts[first])) is not None:
            return prompt
    return encode_request(context, body) if whole is None else whole


def _starts(messages: Sequence[ChatMessage]) -> tuple[list[int], list[int]]:
    """Where what is kept may begin: with a user's message, as templates expect; else within the last turn, but not
    between a call and its result, if the template takes that.
    """
    others = [index for index, message in enumerate(messages) if message.role not in SYSTEM]
    users = [index for index in others if messages[index].role == "user"]
    within = [index for index in others if index > max(users, default=-1) and messages[index].role != "tool"]
    return [index for index in users if index != others[0]], [index for index in within if index != others[0]]


def _encode(context: ServerContext, body: ChatCompletionRequest, *, is_cut: bool = False) -> Prompt | None:
    """None: it is far too long, or it is cut where the template does not allow it."""
    try:
        return encode_request(context, body)
    except BadRequestError as error:
        if not is_cut and error.code != "context_length_exceeded":
            raise
        return None
