"""From a chat request to its prompt: messages, tools and options through the model's chat template."""

from typing import Any

import msgspec
from pydantic import BaseModel

from server.api.chat.schemas import ChatCompletionRequest
from server.context import ServerContext
from server.generation.prompts import Prompt, check_text_size
from server.http.errors import BadRequestError, InvalidValueError, UnsupportedParameterError
from server.schemas.tools import NamedTool, callable_tools, offered_tools
from server.text.chat_template import ChatTemplate, ChatTemplateError, encode_chat
from server.text.output_parser import OutputFormat
from server.text.tokenizer import Tokenizer
from server.text.tool_prompt import describe_tools

EFFORT_OPTIONS = frozenset(("reasoning_effort", "enable_thinking"))  # of templates
NO_EFFORT = (None, "none", "medium")  # which ask nothing of a model that cannot choose
NUM_END_TOKENS = 16  # of a prompt, among which the tag is that begins thoughts


def encode_request(context: ServerContext, body: ChatCompletionRequest) -> Prompt:
    """Raises BadRequestError."""
    template = context.chat_template
    if template is None:
        raise BadRequestError("This model has no chat template; use /v1/completions.", param="messages")
    messages = [message.for_template() for message in body.messages]
    tools = [tool.for_template() for tool in offered_tools(body.tools, body.tool_choice)] or None
    if tools is not None and "tools" not in template.variables:
        messages, tools = describe_tools(messages, tools), None
    options = template_options(template, body)
    check_text_size(len(msgspec.json.encode([messages, tools, options])), context.max_model_len, "messages")
    try:
        token_ids = encode_chat(
            template,
            context.tokenizer,
            messages,
            add_generation_prompt=body.opens_answer,
            continue_final_message=bool(body.continue_final_message),
            tools=tools,
            template_kwargs=options,
        )
    except ChatTemplateError as error:
        raise InvalidValueError(str(error), param="messages") from error
    if body.add_special_tokens and context.tokenizer.add_bos and context.tokenizer.bos_token_id is not None:
        token_ids = [context.tokenizer.bos_token_id, *token_ids]
    if not token_ids:
        raise InvalidValueError(
            "Invalid 'messages': the model's chat template makes nothing of them.", param="messages"
        )
    format = _output_format(template, context.tokenizer, body, token_ids)
    return Prompt(token_ids, output_format=None if format.is_plain else format)


def template_options(template: ChatTemplate, body: ChatCompletionRequest) -> dict[str, Any]:
    """Variables for the template, beside what is always there; those of the request that it reads.

    Raises UnsupportedParameterError for documents that the template does not read.
    """
    given = body.chat_template_kwargs or {}
    options: dict[str, Any] = {name: value for name, value in given.items() if name in template.options}
    if body.documents:
        if "documents" not in template.variables:
            raise UnsupportedParameterError("documents", "The model's chat template does not read them.")
        options["documents"] = body.documents
    if body.reasoning_effort is not None:
        options = _effort_options(template, body.reasoning_effort) | options
    return options


def _effort_options(template: ChatTemplate, effort: str) -> dict[str, Any]:
    if "reasoning_effort" in template.options:
        return {"reasoning_effort": effort}
    if "enable_thinking" in template.options:
        return {"enable_thinking": effort != "none"}
    return {}


def reads_effort(template: ChatTemplate | None) -> bool:
    """Whether a `reasoning_effort` says anything to the model."""
    return template is not None and not EFFORT_OPTIONS.isdisjoint(template.options)


def unread_options(template: ChatTemplate | None, body: BaseModel) -> list[str]:
    """Parameters of a chat that only advise the template, and that it does not read."""
    if template is None or not isinstance(body, ChatCompletionRequest):
        return []
    names = [f"chat_template_kwargs.{name}" for name in body.chat_template_kwargs or {} if name not in template.options]
    if body.reasoning_effort not in NO_EFFORT and not reads_effort(template):
        names.append("reasoning_effort")
    return names


def _output_format(
    template: ChatTemplate, tokenizer: Tokenizer, body: ChatCompletionRequest, token_ids: list[int]
) -> OutputFormat:
    """What may be in the answer beside content."""
    tags = template.think_tags
    is_thinking = False
    if tags is not None and body.continue_final_message:
        is_thinking = tags.are_open_in(body.messages[-1].text)
    elif tags is not None:
        end = tokenizer.decode(token_ids[-NUM_END_TOKENS:], skip_special_tokens=False)
        is_thinking = body.opens_answer and tags.are_opened_by(end)
    return OutputFormat(
        tool_format=template.tool_format,
        tool_names=frozenset(tool.name for tool in callable_tools(body.tools, body.tool_choice)),
        parallel_calls=body.parallel_tool_calls is not False,
        think_tags=tags,
        is_thinking=is_thinking,
        # As at OpenAI: a call that had to be is no reason to end.
        calls_end="stop" if isinstance(body.tool_choice, NamedTool) else "tool_calls",
    )
