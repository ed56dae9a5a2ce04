"""Shortens conversations that exceed the context (`truncation: auto`) by dropping their oldest messages."""

from bisect import bisect_left
from collections.abc import Sequence

from server.api.chat.conversion import encode_request
from server.api.chat.schemas import ChatCompletionRequest, ChatMessage
from server.generation.prompts import Prompt, max_prompt_tokens
from server.http.errors import BadRequestError
from server.models.served_model import ServedModel

SYSTEM_ROLES = ("system", "developer")


def encode_newest(model: ServedModel, body: ChatCompletionRequest, *, limit: int | None = None) -> Prompt:
    """Return the prompt of the longest suffix of the conversation that fits. System messages are always kept.

    If even the last message does not fit, return the prompt of the whole conversation; the pipeline then reports its
    length in an error. Raises BadRequestError, then also for a long conversation that certainly has more tokens than
    `limit`, which is not tokenized.
    """
    room = max_prompt_tokens(body.requested().max_tokens, model.max_model_len)
    whole = _encode(model, body)
    if whole is not None and len(whole.token_ids) <= room:
        return whole

    def prompt_from(start: int) -> Prompt | None:
        kept = [
            message for index, message in enumerate(body.messages) if index >= start or message.role in SYSTEM_ROLES
        ]
        prompt = _encode(model, body.model_copy(update={"messages": kept}), is_truncated=True)
        return prompt if prompt is not None and len(prompt.token_ids) <= room else None

    for starts in _starts(body.messages):
        # Later starts give shorter prompts, so bisection applies if the template accepts every start of this kind.
        first = bisect_left(starts, True, key=lambda start: prompt_from(start) is not None)
        if first < len(starts) and (prompt := prompt_from(starts[first])) is not None:
            return prompt
    return encode_request(model, body, limit=limit) if whole is None else whole


def _starts(messages: Sequence[ChatMessage]) -> tuple[list[int], list[int]]:
    """Return the indices of messages at which the kept part may start, in two lists to try in order.

    The first has the user messages, as templates expect. The second has messages within the last turn, which not all
    templates accept, without tool results: these must follow their call.
    """
    others = [index for index, message in enumerate(messages) if message.role not in SYSTEM_ROLES]
    users = [index for index in others if messages[index].role == "user"]
    within = [index for index in others if index > max(users, default=-1) and messages[index].role != "tool"]
    return [index for index in users if index != others[0]], [index for index in within if index != others[0]]


def _encode(model: ServedModel, body: ChatCompletionRequest, *, is_truncated: bool = False) -> Prompt | None:
    """Return the prompt; None if it is far too long, or if the template rejects a truncated conversation."""
    try:
        return encode_request(model, body, limit=model.max_model_len)
    except BadRequestError as error:
        if not is_truncated and error.code != "context_length_exceeded":
            raise
        return None
