"""How many tokens a conversation is as a prompt."""

import anyio.to_thread
from fastapi import Request

from server.context import get_context
from server.generate.chat_prompt import unread_options
from server.generate.endpoint import Endpoint
from server.generate.frame import encode_prompts
from server.generate.parameters import unknown_parameters, warnings_header
from server.schemas.chat import ChatCompletionRequest


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
