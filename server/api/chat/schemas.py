"""`POST /v1/chat/completions`: the request."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from server.http.errors import invalid
from server.http.validation import echo
from server.schemas.generation_request import GenerationRequest, Requested
from server.schemas.request_fields import (
    MAX_TEMPLATE_OPTIONS,
    NO_LIMIT,
    MaxTokens,
    NumLogprobs,
    OpenObject,
    at_most,
    optional,
)
from server.schemas.tools import ToolCall, ToolChoice, Tools, check_arguments, check_tools, must_call

MAX_MESSAGES = 10_000
MAX_PARTS = 10_000  # per message
MAX_TOOL_CALLS = 1024  # per message
MAX_DOCUMENTS = 1024


class TextPart(OpenObject):
    type: Literal["text"]
    text: str


# Type of a part -> its field with text. Some clients send parts of the Responses API.
PART_TEXTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}


def _check_content(value: object) -> object:
    """Return the content with all parts as parts of type `text`.

    Raises one error for an invalid content, where pydantic's union would raise one per branch.
    """
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticKnownError("string_type")
    return [_text_part(part) for part in value] or ""


def _text_part(part: object) -> object:
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    if not isinstance(part, dict) or kind == "text":
        return part
    if not isinstance(kind, str) or kind not in PART_TEXTS:
        raise ValueError(f"the model reads only text; parts of type {echo(kind)} are not supported.")
    return {"type": "text", "text": part.get(PART_TEXTS[kind])}


TextParts = Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[
    str | TextParts | None, BeforeValidator(_check_content, json_schema_input_type=str | TextParts | None)
]
ToolCalls = Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)]
Documents = Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS, fail_fast=True)]


class ChatMessage(OpenObject):
    """One turn of the conversation. Other fields are not passed to the model."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    name: str | None = optional("Passed to the model's chat template.")
    tool_calls: ToolCalls | None = optional("Tool calls of an earlier answer.")
    tool_call_id: str | None = optional("With role tool: id of the call whose result this is.")
    reasoning_content: str | None = optional("Reasoning of an assistant before its content.")
    reasoning: str | None = optional("Alias of reasoning_content, which takes precedence.")
    content: Content = Field(
        None, validate_default=True, description="Text. Null, for no text, only from an assistant or a tool."
    )

    @field_validator("content")
    @classmethod
    def _check_presence(cls, content: str | list[TextPart] | None, info: ValidationInfo) -> str | list[TextPart] | None:
        if content is None and info.data.get("role") not in ("assistant", "tool"):
            raise PydanticKnownError("missing")
        others = (info.data.get(name) for name in ("tool_calls", "reasoning_content", "reasoning"))
        return content if content is not None or any(others) else ""

    @property
    def text(self) -> str:
        """Content as a single string; parts are joined by newlines."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content or ())

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it.

        The role `developer`, OpenAI's newer name for `system`, becomes `system`: most templates reject it.
        """
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if isinstance(self.content, list):
            message["content"] = [{"type": "text", "text": part.text} for part in self.content]
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.reasoning is not None:
            message.setdefault("reasoning_content", self.reasoning)
        return message


TemplateOptions = Annotated[
    dict[str, str | bool | int | FiniteFloat | None],
    Field(max_length=MAX_TEMPLATE_OPTIONS),
    at_most(MAX_TEMPLATE_OPTIONS),
]
Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatCompletionRequest(GenerationRequest):
    messages: Messages = Field(description="The conversation so far.")
    max_completion_tokens: MaxTokens | None = optional(
        "Maximum number of output tokens; -1: no limit. Default: the rest of the context."
    )
    max_tokens: MaxTokens | None = optional("Deprecated alias of max_completion_tokens.")
    logprobs: bool | None = optional("Return the log probability of each output token.")
    top_logprobs: NumLogprobs | None = optional(
        "With logprobs: number of most likely tokens to return for each position; -1: all."
    )
    return_prompt_text: bool | None = optional("Return the prompt that the chat template renders, as prompt_text.")
    add_generation_prompt: bool | None = optional("End the prompt with the start of an assistant's turn. Default true.")
    continue_final_message: bool | None = optional(
        "Continue the last message, an assistant's. The answer does not repeat its text."
    )
    echo: bool | None = optional("Prepend the last message's text to the answer, if it is an assistant's.")
    add_special_tokens: bool | None = optional(
        "Prepend the model's BOS token, if it has one, to the rendered prompt. Default false: chat "
        "templates write it themselves where needed."
    )
    chat_template_kwargs: TemplateOptions | None = optional(
        "Variables for the model's chat template, such as enable_thinking."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = optional(
        "Passed to the chat template; enable_thinking and thinking are on unless it is none."
    )
    include_reasoning: bool | None = optional("Return the model's reasoning. Default true.")
    documents: Documents | None = optional("Passed to the chat template.")

    tools: Tools | None = optional("Functions that the model may call.")
    tool_choice: ToolChoice | None = optional("Whether the model calls a tool, and which one. Default auto.")
    parallel_tool_calls: bool | None = optional("Allow several tool calls in one answer. Default true.")

    def requested(self) -> Requested:
        limits = [limit for limit in (self.max_completion_tokens, self.max_tokens) if limit is not None]
        return Requested(
            num_prompts=1,
            num_choices=self.n or 1,
            num_returned_choices=self.n or 1,
            max_tokens=max(limits, default=None),  # of the two, NO_LIMIT yields
            num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            num_prompt_logprobs=self.prompt_logprobs,
            wants_timings=self.lightwell is not None and bool(self.lightwell.explain),
        )

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "only allowed with 'logprobs': true")
        if len({self.max_tokens, self.max_completion_tokens} - {None, NO_LIMIT}) > 1:
            raise invalid("max_tokens", "it is an alias of 'max_completion_tokens', which has a different value")
        if self.tools is not None or self.tool_choice is not None:
            check_tools(self.tools, self.tool_choice)
        if calls := [call for message in self.messages for call in message.tool_calls or ()]:
            check_arguments(calls)
        if self.tool_choice is not None and must_call(self.tool_choice) and (names := list(self.requested_outputs)):
            raise invalid(names[0], "not allowed with a 'tool_choice' that forces a tool call")
        if self.continue_final_message:
            self._check_final_message()

    def _check_final_message(self) -> None:
        if self.add_generation_prompt:
            raise invalid("continue_final_message", "not allowed with 'add_generation_prompt': true")
        final = self.messages[-1]
        if final.role != "assistant" or final.content is None or final.tool_calls:
            problem = "expected the last message to have role 'assistant', content, and no tool calls"
            raise invalid("continue_final_message", problem)
