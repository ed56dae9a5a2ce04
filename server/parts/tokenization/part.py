"""Texts as token ids and back, and prompts as the model sees them, under vLLM's paths.

Texts are processed in threads so as not to block the event loop.
"""

import time
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field

from engine.shared.messages import Submit
from server.api.chat.routes import ChatEndpoint, encode_request, unknown_in_messages
from server.api.chat.schemas import ChatCompletionRequest, Messages, TemplateOptions
from server.api.completions.routes import CompletionEndpoint
from server.api.completions.schemas import CompletionRequest
from server.context import RequestSteps, get_context
from server.dialect import BEGINNING, ID, MESSAGES, MODEL, Dialect, ModelRoute, Operation
from server.generation.endpoint import Body, Endpoint
from server.generation.job import Job, prepare
from server.generation.pipeline import validate
from server.generation.preamble import begin, find_model
from server.generation.prompts import vocab_size
from server.http.errors import InvalidValueError, MissingParameterError, invalid
from server.http.responses import StructResponse
from server.http.strict_json import end_with_client
from server.models.served_model import ServedModel
from server.part import Part
from server.schemas.request_fields import OpenObject, optional
from server.schemas.tools import Tools
from server.tenants import get_tenant

MAX_TEXT_BYTES = 1 << 20  # of a prompt to tokenize
MAX_DETOKENIZE_TOKENS = 1 << 20
CHAT_FIELDS = frozenset(ChatCompletionRequest.model_fields) - {"prompt"}

router = APIRouter()
json_router = APIRouter(route_class=ModelRoute)


# Prompts, which are rendered and not sent to the engine.


class RenderedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of a request as the model would see it."""

    request_id: str
    model: str
    prompt: str  # the token ids as text, including special tokens
    token_ids: list[int]
    max_tokens: int  # per choice
    sampling_params: dict[str, Any]  # as sent to the engine; the seed is null unless the request sets it


@json_router.post("/v1/chat/completions/render")
async def render_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """Return the rendered prompt of a conversation without generating."""
    (prompt,), headers = await _render(request, body, ChatEndpoint())
    return StructResponse(prompt, headers=headers)


@json_router.post("/v1/completions/render")
async def render_completion(request: Request, body: CompletionRequest) -> Response:
    """Return the prompts as token ids and text without generating."""
    prompts, headers = await _render(request, body, CompletionEndpoint())
    return StructResponse(prompts, headers=headers)


async def _render(
    request: Request, body: Body, endpoint: Endpoint[Body]
) -> tuple[list[RenderedPrompt], dict[str, str]]:
    """Return the prompts as they would be sent to the engine, and response headers. Raises APIError."""
    # Rendering must not change the seeds of later requests.
    job = await validate(request, body, endpoint, RequestSteps(), default_seed=0)
    submits, _ = await prepare(job)

    def encode() -> list[RenderedPrompt]:
        return [_rendered(job, submit) for submit in submits]

    rendered = await job.context.run_text_work(request, encode)
    job.set_headers(submits)
    del job.headers["x-lightwell-seed"]
    return rendered, job.headers


def _rendered(job: Job[Body], submit: Submit) -> RenderedPrompt:
    params = dict(zip(submit.params.__struct_encode_fields__, msgspec.structs.astuple(submit.params), strict=True))
    return RenderedPrompt(
        request_id=submit.request_id,
        model=job.model.name,
        prompt=job.model.base.tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False),
        token_ids=submit.prompt_token_ids,
        max_tokens=submit.params.max_tokens,
        sampling_params=params | {"seed": None if job.body.seed in (None, -1) else submit.params.seed},
    )


# Texts and tokens.


class TokenizeRequest(OpenObject):
    """Either a text prompt, or messages that are rendered by the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = optional("Default: true for a prompt, false for messages.")
    add_generation_prompt: bool | None = optional("Only with messages. Default true.")
    continue_final_message: bool | None = optional(
        "Only with messages, the last of which must have the role assistant."
    )
    chat_template_kwargs: TemplateOptions | None = optional("Only with messages.")
    tools: Tools | None = optional("Only with messages.")
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Raise BadRequestError if fields contradict each other."""
        if self.prompt is None and self.messages is None:
            raise MissingParameterError("prompt")
        if self.prompt is not None and self.messages is not None:
            raise InvalidValueError("Expected either 'prompt' or 'messages', but got both.", param="messages")
        if self.messages is not None:
            self.chat().check()

    def chat(self) -> ChatCompletionRequest:
        """Return the chat request with the same prompt. Requires `messages`."""
        shared = {name: getattr(self, name) for name in type(self).model_fields if name in CHAT_FIELDS}
        return ChatCompletionRequest.model_construct(**shared)


class TokenizeResponse(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


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


def _tokenize(model: ServedModel, body: TokenizeRequest, max_model_len: int) -> bytes:
    token_ids = _encode_prompt(model, body) if body.messages is None else encode_request(model, body.chat()).token_ids
    token_strs = None
    if body.return_token_strs:
        token_strs = [model.tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids]
    return msgspec.json.encode(TokenizeResponse(len(token_ids), max_model_len, token_ids, token_strs))


def _encode_prompt(model: ServedModel, body: TokenizeRequest) -> list[int]:
    prompt = body.prompt or ""
    if (num_bytes := len(prompt.encode())) > MAX_TEXT_BYTES:
        problem = f"text too long. Expected at most {MAX_TEXT_BYTES} bytes, but got {num_bytes}"
        raise invalid("prompt", problem, code="string_above_max_length")
    return model.tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens is not False)


class DetokenizeRequest(OpenObject):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_DETOKENIZE_TOKENS, fail_fast=True)]


class DetokenizeResponse(msgspec.Struct, frozen=True):
    prompt: str


@json_router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Decode token ids to text."""
    context = get_context(request)
    model = find_model(request, body.model).base
    headers = begin(request, body).accept()
    size = vocab_size(model)
    if body.tokens and (largest := max(body.tokens)) >= size:
        raise invalid("tokens", f"expected token ids from 0 to {size - 1}, but got {largest} instead")

    def decode() -> bytes:
        text = model.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return msgspec.json.encode(DetokenizeResponse(text))

    return context.long_answer(request, await context.run_text_work(request, decode), headers)


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What `tokenizer_config.json` says, under its names. A model from a GGUF file has no such file."""

    tokenizer_class: Literal["PreTrainedTokenizerFast"] = "PreTrainedTokenizerFast"
    model_max_length: int  # tokens
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    add_bos_token: bool
    chat_template: str | None


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """Return the special tokens and the chat template, for clients that render and count by themselves."""
    end_with_client(request.scope)
    context, name = get_context(request), request.query_params.get("model")
    models = context.models
    slot = None if name is None and len(models.slots) > 1 else models.find_slot(name, get_tenant(request))
    async with models.keep_loaded(request, slot):
        model = find_model(request, name).base
        tokenizer, template = model.tokenizer, model.chat_template
        info = TokenizerInfo(
            model_max_length=model.max_model_len,
            vocab_size=tokenizer.vocab_size,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            add_bos_token=tokenizer.add_bos,
            chat_template=None if template is None else template.source,
        )
    return StructResponse(info)


# Their descriptions.

RENDERED = RenderedPrompt(
    request_id=f"cmpl-{ID}-0",
    model=MODEL,
    prompt=BEGINNING,
    token_ids=[6403, 2980, 253, 655],
    max_tokens=20,
    sampling_params={"max_tokens": 20, "temperature": 1.0, "seed": None},
)
COMPLETION = {"prompt": BEGINNING, "max_tokens": 20}
CHAT = {"messages": MESSAGES, "max_completion_tokens": 20}

TOKENIZATION = Dialect(
    tag="Lightwell",
    routers=[json_router, router],
    operations={
        ("/v1/completions/render", "post"): Operation(
            list[RenderedPrompt],
            {"prompt": BEGINNING, "max_tokens": 20},
            answer_example=[RENDERED],
            reaches_engine=True,
        ),
        ("/v1/chat/completions/render", "post"): Operation(
            RenderedPrompt,
            {"messages": MESSAGES, "max_completion_tokens": 20},
            answer_example=RENDERED,
            reaches_engine=True,
        ),
        ("/tokenize", "post"): Operation(TokenizeResponse, {"prompt": BEGINNING}),
        ("/detokenize", "post"): Operation(DetokenizeResponse, {"tokens": [10, 11, 12]}),
        ("/tokenizer_info", "get"): Operation(TokenizerInfo),
    },
    in_workers=True,
)

PART = Part(dialects=[TOKENIZATION])
