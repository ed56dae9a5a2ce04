"""OpenAI's chat completions: `POST /v1/chat/completions`, and how a request becomes its prompt.

Messages, tools and options are rendered with the model's chat template.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.chat.schemas import ChatCompletionRequest, ChatMessage
from server.api.chat.writer import ChatCompletion, ChatCompletionChunk, ChatWriter
from server.dialect import MESSAGES, Dialect, Operation, StreamRoute
from server.generation.endpoint import AnswerMetadata, Endpoint, Writer
from server.generation.pipeline import respond
from server.generation.preamble import distinct, undeclared_fields
from server.generation.prompts import Prompt, check_min_tokens, check_text_size, check_token_range
from server.http.errors import BadRequestError, InvalidValueError, UnsupportedParameterError, invalid
from server.models.served_model import ServedModel
from server.part_table import as_sentence
from server.schemas.request_fields import NO_LIMIT
from server.schemas.tools import NamedTool, callable_tools, offered_tools
from server.text.parsers.answer_parser import AnswerFormat
from server.text.templates.chat_encoding import encode_chat
from server.text.templates.chat_template import ChatTemplate, describe_tools
from server.text.templates.sandbox import ChatTemplateError, TemplateLimitError
from server.text.tokenizer import Tokenizer

REASONING_SWITCHES = ("enable_thinking", "thinking")  # template variables that turn reasoning on and off
EFFORT_OPTIONS = frozenset(("reasoning_effort", *REASONING_SWITCHES))  # template variables that set the effort
NEUTRAL_EFFORTS = (None, "none", "medium")  # not worth a warning if the model has no choice of efforts
# Fields of an earlier answer that OpenAI's clients send back. The model never saw them as text.
HARMLESS_IN_MESSAGES = frozenset(("refusal", "annotations"))
# Fields of a request that are variables of the template.
OPTION_FIELDS = frozenset(("chat_template_kwargs", "documents", "reasoning_effort"))
NUM_END_TOKENS = 64  # at the end of the prompt; long enough to hold a tag that opens reasoning


class ChatEndpoint(Endpoint[ChatCompletionRequest]):
    """`POST /v1/chat/completions` for the generation pipeline."""

    noun = "messages"
    id_prefix = "chatcmpl-"
    operation = "chat"

    def max_tokens_field(self, body: ChatCompletionRequest) -> str:
        return "max_tokens" if body.max_completion_tokens in (None, NO_LIMIT) else "max_completion_tokens"

    def ignored_fields(self, model: ServedModel, body: ChatCompletionRequest) -> list[str]:
        names = unknown_in_messages(body.messages)
        if not OPTION_FIELDS.isdisjoint(body.model_fields_set):
            names += unread_options(model.chat_template, body)
        return names

    def encode(self, model: ServedModel, body: ChatCompletionRequest, *, limit: int | None = None) -> list[Prompt]:
        return [encode_request(model, body, limit=limit)]

    def writer(
        self, model: ServedModel, body: ChatCompletionRequest, metadata: AnswerMetadata, prompts: Sequence[Prompt]
    ) -> Writer:
        return ChatWriter(model.tokenizer, metadata, body, prompts)


def encode_request(model: ServedModel, body: ChatCompletionRequest, *, limit: int | None = None) -> Prompt:
    """Return the prompt of a chat request.

    Raises BadRequestError, before tokenizing if a long prompt certainly has more tokens than `limit`.
    """
    template = model.chat_template
    if template is None:
        raise BadRequestError("This model has no chat template; use /v1/completions.", param="messages")
    messages = [message.for_template() for message in body.messages]
    tools = None
    if body.tools:
        tools = [tool.for_template() for tool in offered_tools(body.tools, body.tool_choice)] or None
    if tools is not None and (missing := template.missing_part) is not None:
        raise BadRequestError(as_sentence(missing), param="tools", code="part_not_installed")
    if tools is not None and not template.describes_tools:
        messages, tools = describe_tools(messages, tools), None
    options = {} if OPTION_FIELDS.isdisjoint(body.model_fields_set) else template_options(template, body)
    opens_answer = body.add_generation_prompt is not False and not body.continue_final_message
    if template.answers is not None:
        messages, options = template.answers.convert(messages, options)
    max_len = limit or model.max_model_len
    check_text_size(len(msgspec.json.encode([messages, tools, options])), max_len, "messages")
    try:
        token_ids = encode_chat(
            template,
            model.tokenizer,
            messages,
            add_generation_prompt=opens_answer,
            continue_final_message=bool(body.continue_final_message),
            tools=tools,
            template_kwargs=options,
            check_prompt=None if limit is None else partial(check_min_tokens, model, limit=limit, noun="messages"),
        )
    except (ChatTemplateError, TemplateLimitError) as error:
        raise InvalidValueError(str(error), param="messages") from error
    if body.add_special_tokens and model.tokenizer.add_bos and model.tokenizer.bos_token_id is not None:
        token_ids = [model.tokenizer.bos_token_id, *token_ids]
    if not token_ids:
        raise invalid("messages", "the model's chat template renders them as an empty prompt")
    check_token_range(model, token_ids, "messages")
    if not body.tools and template.has_plain_answers:
        return Prompt(token_ids)
    format = _output_format(template, model.tokenizer, body, token_ids, opens_answer=opens_answer)
    return Prompt(token_ids, answer_format=None if format.is_plain else format)


def template_options(template: ChatTemplate, body: ChatCompletionRequest) -> dict[str, Any]:
    """Return the request's optional variables that the chat template reads.

    Raises UnsupportedParameterError for documents if the template does not read them.
    """
    kwargs = body.chat_template_kwargs or {}
    options: dict[str, Any] = {name: value for name, value in kwargs.items() if name in template.options}
    if body.documents:
        if "documents" not in template.variables:
            raise UnsupportedParameterError("documents", "The model's chat template does not read documents.")
        options["documents"] = body.documents
    if body.reasoning_effort is not None:
        options = _effort_options(template, body.reasoning_effort) | options
    return options


def _effort_options(template: ChatTemplate, effort: str) -> dict[str, Any]:
    """Return the template variables that stand for a reasoning effort."""
    switches = {name: effort != "none" for name in REASONING_SWITCHES if name in template.options}
    return switches | ({"reasoning_effort": effort} if "reasoning_effort" in template.options else {})


def reads_effort(template: ChatTemplate | None) -> bool:
    """Return whether the chat template depends on `reasoning_effort`."""
    return template is not None and not EFFORT_OPTIONS.isdisjoint(template.options)


def unknown_in_messages(messages: Sequence[ChatMessage]) -> list[str]:
    """Return distinct names of the undeclared fields of messages, such as `messages[].content[].x`.

    Fields that are null are left out: clients send them for absent fields. Of many names, some are returned.
    """
    odd = [message for message in messages if message.model_extra or isinstance(message.content, list)]
    return distinct(_unknown_in_messages(odd)) if odd else []


def _unknown_in_messages(messages: Sequence[ChatMessage]) -> Iterator[str]:
    for message in messages:
        for name, value in undeclared_fields(message):
            if value is not None and name not in HARMLESS_IN_MESSAGES:
                yield f"messages[].{name}"
        for part in message.content if isinstance(message.content, list) else ():
            for name, value in undeclared_fields(part):
                if value is not None:
                    yield f"messages[].content[].{name}"


def unread_options(template: ChatTemplate | None, body: ChatCompletionRequest) -> list[str]:
    """Return the names of the request's template options that the template does not read."""
    if template is None:
        return []
    names = [f"chat_template_kwargs.{name}" for name in body.chat_template_kwargs or {} if name not in template.options]
    if body.reasoning_effort not in NEUTRAL_EFFORTS and not reads_effort(template):
        names.append("reasoning_effort")
    return names


def _output_format(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    body: ChatCompletionRequest,
    token_ids: list[int],
    *,
    opens_answer: bool,
) -> AnswerFormat:
    """Return which parts an answer may have beside content: tool calls and reasoning."""
    fields: dict[str, Any] = {
        "tools": {tool.name: tool.parameters for tool in callable_tools(body.tools, body.tool_choice)},
        "parallel_calls": body.parallel_tool_calls is not False,
        # As OpenAI does: a forced call ends with `stop`.
        "calls_end": "stop" if isinstance(body.tool_choice, NamedTool) else "tool_calls",
    }
    if template.answers is not None:
        return template.answers.format(**fields, is_final=bool(body.continue_final_message))
    tags = template.reasoning_tags
    is_reasoning = False
    if tags is not None and body.continue_final_message:
        is_reasoning = tags.are_open_in(body.messages[-1].text)
    elif tags is not None:
        end = tokenizer.decode(token_ids[-NUM_END_TOKENS:], skip_special_tokens=False)
        is_reasoning = opens_answer and tags.are_opened_by(end)
    return AnswerFormat(
        **fields,
        tool_format=template.tool_format,
        reasoning_tags=tags,
        content_markers=template.reasoning.content_markers,
        is_reasoning=is_reasoning,
    )


router = APIRouter(route_class=StreamRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """Generate the next message of a conversation."""
    return await respond(request, body, ChatEndpoint())


EXAMPLE = {"messages": MESSAGES, "max_completion_tokens": 20}

CHAT = Dialect(
    tag="OpenAI",
    routers=[router],
    operations={("/v1/chat/completions", "post"): Operation(ChatCompletion, EXAMPLE, ChatCompletionChunk)},
    in_workers=True,
)
