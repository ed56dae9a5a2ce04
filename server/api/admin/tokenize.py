"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`.

Texts are processed in threads so as not to block the event loop.
"""

import time

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.admin.schemas import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from server.api.chat.conversion import encode_request, unknown_in_messages
from server.api.model_route import ModelRoute
from server.context import get_context
from server.generation.preamble import begin, find_model
from server.generation.prompts import vocab_size
from server.http.errors import InvalidValueError
from server.http.json_response import StructResponse
from server.http.json_route import end_with_client
from server.models.served_model import ServedModel
from server.tenants import get_tenant

router = APIRouter()
json_router = APIRouter(route_class=ModelRoute)

MAX_TEXT_BYTES = 1 << 20


@json_router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Encode a prompt, or messages rendered by the chat template, as token ids."""
    context = get_context(request)
    model = find_model(request, body.model)
    headers = begin(request, body, ignored=unknown_in_messages(body.messages or ())).accept()
    body.check()
    max_model_len = model.base.max_model_len
    start = time.monotonic()
    answer = await context.run_text_work(request, _tokenize, model.base, body, max_model_len)
    model.base.metrics.observe_tokenizer(time.monotonic() - start)
    return context.long_answer(request, answer, headers)


@json_router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Decode token ids to text."""
    context = get_context(request)
    model = find_model(request, body.model)
    headers = begin(request, body).accept()
    _check_token_ids(body.tokens, vocab_size(model.base))
    answer = await context.run_text_work(request, _detokenize, model.base, body)
    return context.long_answer(request, answer, headers)


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """Return the special tokens and the chat template, for clients that render and count by themselves."""
    end_with_client(request.scope)
    context, name = get_context(request), request.query_params.get("model")
    models = context.models
    slot = None if name is None and len(models.slots) > 1 else models.find_slot(name, get_tenant(request))
    async with context.source.loaded(request, slot):
        return StructResponse(_tokenizer_info(find_model(request, name).base))


def _tokenizer_info(model: ServedModel) -> TokenizerInfo:
    tokenizer, template = model.tokenizer, model.chat_template
    return TokenizerInfo(
        model_max_length=model.max_model_len,
        vocab_size=tokenizer.vocab_size,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        add_bos_token=tokenizer.add_bos,
        chat_template=None if template is None else template.source,
    )


def _detokenize(model: ServedModel, body: DetokenizeRequest) -> bytes:
    text = model.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return msgspec.json.encode(DetokenizeResponse(text))


def _tokenize(model: ServedModel, body: TokenizeRequest, max_model_len: int) -> bytes:
    token_ids = _encode_prompt(model, body) if body.messages is None else encode_request(model, body.chat()).token_ids
    token_strs = None
    if body.return_token_strs:
        token_strs = [model.tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids]
    return msgspec.json.encode(TokenizeResponse(len(token_ids), max_model_len, token_ids, token_strs))


def _encode_prompt(model: ServedModel, body: TokenizeRequest) -> list[int]:
    prompt = body.prompt or ""
    _check_size(prompt, "prompt")
    return model.tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens is not False)


def _check_size(text: str, param: str) -> None:
    if (num_bytes := len(text.encode())) > MAX_TEXT_BYTES:
        message = f"Invalid '{param}': text too long. Expected at most {MAX_TEXT_BYTES} bytes, but got {num_bytes}."
        raise InvalidValueError(message, param=param, code="string_above_max_length")


def _check_token_ids(token_ids: list[int], size: int) -> None:
    if token_ids and (largest := max(token_ids)) >= size:
        message = f"Invalid 'tokens': expected token ids from 0 to {size - 1}, but got {largest} instead."
        raise InvalidValueError(message, param="tokens")
