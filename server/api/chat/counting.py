"""How many tokens a conversation is as a prompt."""

import anyio.to_thread
from fastapi import Request

from server.api.chat.prompt import unread_options
from server.api.chat.schemas import ChatCompletionRequest
from server.context import get_context
from server.generation.endpoint import Endpoint
from server.generation.parameters import unknown_parameters, warnings_header
from server.generation.pipeline import encode_prompts


async def count_prompt_tokens(
    request: Request, body: ChatCompletionRequest, endpoint: Endpoint[ChatCompletionRequest]
) -> tuple[int, dict[str, str]]:
    """The number, and headers of the answer. Raises BadRequestError or ModelNotFoundError."""
    context = get_context(request)
    context.find_model(body.model)
    unread = unread_options(context.chat_template, body)
    unknown = unknown_parameters(body, strict=context.settings.strict, unread=unread)
    body.check()
    context.metrics.count_unknown_parameters(len(unknown))
    limiter = context.tokenize_threads
    (prompt,) = await anyio.to_thread.run_sync(encode_prompts, context, body, endpoint, limiter=limiter)
    return len(prompt.token_ids), {"x-lightwell-warnings": warnings_header(unknown)} if unknown else {}
