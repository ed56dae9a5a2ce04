"""Counts the prompt tokens of a conversation."""

from fastapi import Request

from server.api.chat.schemas import ChatCompletionRequest
from server.context import get_context
from server.generation.endpoint import Endpoint
from server.generation.preamble import begin, find_generating_model
from server.generation.submission import encode_prompts
from server.tenants import get_tenant


async def count_prompt_tokens(
    request: Request, body: ChatCompletionRequest, endpoint: Endpoint[ChatCompletionRequest]
) -> tuple[int, dict[str, str]]:
    """Return the number of prompt tokens and the headers of the answer.

    Raises BadRequestError or ModelNotFoundError.
    """
    context = get_context(request)
    model = find_generating_model(context, body.model, get_tenant(request))
    ignored = endpoint.ignored_fields(model.base, body)
    preamble = begin(request, body, is_model_missing=body.model is None, ignored=ignored)
    body.check()
    headers = preamble.accept()
    (prompt,) = await context.run_text_work(request, encode_prompts, model.base, body, endpoint)
    return len(prompt.token_ids), headers
