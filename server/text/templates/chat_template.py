"""Render chat messages to the prompt format that the model was trained on, with the model's own Jinja template."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from engine.shared.parts import MissingPartError
from server.text.parsers.answer_parser import ReasoningTags
from server.text.parsers.tool_formats import GENERIC, ToolFormat
from server.text.templates.reasoning_probe import ReasoningFormat, probe_reasoning_format
from server.text.templates.sandbox import ChatTemplateError, SandboxedTemplate
from server.text.templates.syntaxes import NAMES as TOOL_NAMES
from server.text.templates.syntaxes import QUESTION, AnswerSyntax, answer_syntax, missing_part
from server.text.templates.tool_probe import TOOLS as PROBE_TOOLS
from server.text.templates.tool_probe import Render, assistant, probe_tool_format, user

Message = dict[str, Any]

UNRECOGNIZED = "unrecognized"  # name of a format of tool calls or reasoning that was not found
END = "\U0010fffd"  # a private-use character that marks the end of the final message

# For models whose chat template does not support tools, or not all of them. Calls are in the format `GENERIC`.
INSTRUCTIONS = """\
You may call these functions:
{tools}

To call one, answer with nothing but a JSON object {{"name": its name, "arguments": an object}}.
To call several, answer with an array of such objects. You will be given what they return.
Where no function is needed, answer as usual."""


class ChatTemplate:
    """A chat template. It is immutable, so several threads can render at once.

    Attributes:
        variables: names of the variables that the template reads.
        options: names of the variables that a request can set.
        tool_format, reasoning: how the model writes tool calls and reasoning, found by rendering conversations.
        answers: the syntax of conversations and answers; None: answers are content, calls and reasoning.
        missing_part: what tool calls need that is not installed, if they do.
        has_plain_answers: whether all of an answer is content where there are no tools.
        keeps_system_position: whether a system message between other turns is rendered in its position.
    """

    def __init__(self, renderer: SandboxedTemplate, *, bos_token: str | None, eos_token: str | None) -> None:
        """Render conversations to find the properties of the template. Raises TemplateLimitError if that takes long."""
        self.source, self.variables, self.options = renderer.source, renderer.variables, renderer.options
        self._renderer = renderer
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        self._writes_json_arguments = False
        self._takes_system_tools = False
        self._omits_calls = False
        self._as_read: frozenset[str] = frozenset()  # roles whose messages with a text alone need no conversion
        self.reasoning = ReasoningFormat()
        self._converters = {role: self._choose_converter(role) for role in ("user", "system", "assistant")}
        self._takes_system_tools = "tools" not in self.variables and self._reads_system_tools()
        self.answers: AnswerSyntax | None = None
        self.missing_part: MissingPartError | None = None
        self.tool_format = replace(GENERIC, is_recognized=False)
        self._find_formats()
        self.keeps_system_position = self._keeps_system_position()
        self.has_plain_answers = self.reasoning.tags is None and not self.reasoning.content_markers
        self._as_read = frozenset(role for role, each in self._converters.items() if each is not _to_parts)

    @property
    def reasoning_tags(self) -> ReasoningTags | None:
        return self.reasoning.tags

    @property
    def describes_tools(self) -> bool:
        """True if the template writes the tools that the model may call."""
        return "tools" in self.variables or self._takes_system_tools

    @property
    def tool_format_name(self) -> str:
        return self.tool_format.name if self.tool_format.is_recognized else UNRECOGNIZED

    @property
    def reasoning_format_name(self) -> str | None:
        """The tag that begins reasoning; None if the model does not reason."""
        if not self.reasoning.is_recognized:
            return UNRECOGNIZED
        return None if self.reasoning.tags is None else self.reasoning.tags.start

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Render the prompt as text.

        With `continue_final_message`, the prompt ends where the content of the last message ends.

        The content of a message is a string or a list of text parts. It is converted to the form that the template
        handles: parts are joined by newlines for a template that only takes strings, and a string becomes one part for
        a template that only takes parts. None becomes the empty string. `template_kwargs` are additional variables.

        Raises:
            ChatTemplateError: the template fails, or `template_kwargs` contains a reserved name.
            TemplateLimitError: the template takes too long.
        """
        converted = [
            message
            if len(message) == 2 and isinstance(message.get("content"), str) and message.get("role") in self._as_read
            else self._convert(message)
            for message in messages
        ]
        if tools and self._takes_system_tools:
            converted, tools = _with_system_tools(converted, tools), None
        if continue_final_message:
            converted[-1] = _mark_end(converted[-1])
        variables = {
            **self._tokens,
            "messages": converted,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        extra = template_kwargs or {}
        if taken := extra.keys() & variables.keys():
            raise ChatTemplateError(f"chat_template_kwargs cannot set {min(taken)!r}.")
        variables = {"documents": None, **extra, **variables}
        prompt = self._render_tools(variables) if tools else self._renderer.render(variables)
        return _cut_at_end(prompt) if continue_final_message else prompt

    def _render_tools(self, variables: dict[str, Any]) -> str:
        """Render once more, with empty descriptions, if the template cannot do without those that tools lack."""
        try:
            return self._renderer.render(variables)
        except ChatTemplateError:
            tools = variables["tools"] or []
            described = [with_descriptions(tool) for tool in tools]
            if described == tools:
                raise
        return self._renderer.render({**variables, "tools": described})

    def close(self) -> None:
        """End the processes in which the template runs."""
        self._renderer.close()

    def _find_formats(self) -> None:
        """Find how the model writes answers: their parts, tool calls and reasoning."""
        try:
            self.answers = answer_syntax(self._probe("assistant", "x"))
        except MissingPartError as error:  # all of an answer is content
            self.missing_part = error
            return
        if self.answers is not None:
            self.tool_format = self.answers.tool_format
            self.reasoning = ReasoningFormat(self.answers.tags, message_field=self.answers.message_field)
            return
        self.tool_format = self._find_tool_format()
        self.missing_part = None if self.tool_format.is_recognized else missing_part()
        self._omits_calls = self._omits_calls_of_messages()
        self.reasoning = probe_reasoning_format(_remember(self._try_render), self.options)

    def _find_tool_format(self) -> ToolFormat:
        """Find the format of tool calls, and whether the template takes their arguments as an object or as JSON."""
        formats = []
        for self._writes_json_arguments in (False, True):
            formats.append(probe_tool_format(_remember(self._try_render)) or GENERIC)
            if formats[-1].is_recognized and formats[-1].name != GENERIC.name:
                end, eos = formats[-1].end, self._tokens.get("eos_token")
                return replace(formats[-1], end=end.partition(eos)[0]) if eos else formats[-1]
        self._writes_json_arguments = False
        return formats[0]

    def _try_render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str | None:
        """Return the rendered messages, or None if the template cannot render them."""
        try:
            return self.render(
                messages, add_generation_prompt=add_generation_prompt, tools=tools, template_kwargs=options
            )
        except ChatTemplateError:
            return None

    def _convert(self, message: Message) -> Message:
        return self._convert_calls(self._convert_reasoning(self._convert_content(message)))

    def _convert_content(self, message: Message) -> Message:
        if "content" not in message:
            return message
        convert = self._converters.get(message.get("role", ""), self._converters["user"])
        content = message["content"]
        if isinstance(content, list):
            _check_parts(content)
        return {**message, "content": convert("" if content is None else content)}

    def _reads_system_tools(self) -> bool:
        """Return whether the template reads tools from the system message, as that of Phi-4-mini does."""
        messages = [{"role": "system", "content": "x", "tools": "lightwell"}, {"role": "user", "content": "x"}]
        return "lightwell" in (self._try_render(messages) or "")

    def _convert_reasoning(self, message: Message) -> Message:
        """Return the message with its reasoning under the name that the template reads."""
        field = self.reasoning.message_field
        if field in (None, "reasoning_content") or "reasoning_content" not in message:
            return message
        return {field: message["reasoning_content"], **message}

    def _omits_calls_of_messages(self) -> bool:
        """Return whether the template asks for a format of calls, but does not write those of earlier messages."""
        text = self._try_render([user(), assistant(num_calls=1)], tools=PROBE_TOOLS)
        is_known = self.tool_format.is_recognized and self.tool_format.name != GENERIC.name
        return is_known and text is not None and TOOL_NAMES[0] not in text.rpartition(QUESTION)[2]

    def _convert_calls(self, message: Message) -> Message:
        calls = message.get("tool_calls")
        if calls and self._omits_calls:
            text = self.tool_format.write_calls([call["function"] for call in calls])
            others = {name: value for name, value in message.items() if name != "tool_calls"}
            return {**others, "content": append_text(message["content"], text)}
        if not (self._writes_json_arguments and calls):
            return message
        calls = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            calls.append({**call, "function": {**call["function"], "arguments": text}})
        return {**message, "tool_calls": calls}

    def _choose_converter(self, role: str) -> Callable[[Any], Any]:
        """Render test messages to find out which forms of content the template handles for this role."""
        text = "lightwell"
        from_string = self._probe(role, text)
        from_parts = self._probe(role, _to_parts(text))
        if text in from_string:
            return (lambda content: content) if from_parts == from_string else _to_string
        return _to_parts if text in from_parts else _to_string

    def _keeps_system_position(self) -> bool:
        """Render system messages between other turns; some templates reject them, drop them or move them up."""
        roles = ("system", "user", "system", "assistant", "system", "user", "system")
        texts = [f"lightwell-{index}" for index in range(len(roles))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        try:
            prompt = self.render(messages, add_generation_prompt=False)
        except ChatTemplateError:
            return False
        positions = [prompt.find(text) for text in texts]
        return -1 not in positions and positions == sorted(positions)

    def _probe(self, role: str, content: Any) -> str:
        roles = {"user": ("user",), "system": ("system", "user"), "assistant": ("user", "assistant")}[role]
        filler = "x" if isinstance(content, str) else _to_parts("x")
        messages = [{"role": each, "content": content if each == role else filler} for each in roles]
        try:
            return self._renderer.render({**self._tokens, "messages": messages, "tools": None, "documents": None})
        except ChatTemplateError:
            return ""


def _with_system_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """Return the messages with the tools as JSON in the first one, the system message."""
    text = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    has_system = messages[0].get("role") == "system"
    first = messages[0] if has_system else {"role": "system", "content": ""}
    return [{**first, "tools": text}, *messages[1 if has_system else 0 :]]


def _remember(render: Render) -> Render:
    """Return a function that renders the same conversation only once."""
    texts: dict[str, str | None] = {}

    def render_once(*messages: Any, **options: Any) -> str | None:
        key = json.dumps([messages, options])
        if key not in texts:
            texts[key] = render(*messages, **options)
        return texts[key]

    return render_once


def _to_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _to_string(content: Any) -> Any:
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content


def _check_parts(parts: list[Any]) -> None:
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ChatTemplateError("content: only parts of type 'text' are supported.")


def _mark_end(message: Message) -> Message:
    content = message.get("content", "")
    if isinstance(content, list):
        *others, last = content or _to_parts("")
        return {**message, "content": [*others, {**last, "text": last["text"] + END}]}
    return {**message, "content": content + END}


def _cut_at_end(prompt: str) -> str:
    if prompt.count(END) != 1:
        raise ChatTemplateError("The final message cannot be continued: the chat template changes or repeats it.")
    return prompt[: prompt.index(END)]


# Tools in the system message.


def describe_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """Return the messages with the tools described in the system message, and with earlier calls written as content."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    instructions = INSTRUCTIONS.format(tools=functions)
    written = [_write_calls(message) for message in messages]
    if not (written and written[0]["role"] == "system"):
        return [{"role": "system", "content": instructions}, *written]
    return [{**written[0], "content": append_text(written[0]["content"], instructions, "\n\n")}, *written[1:]]


def with_descriptions(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool with an empty description wherever its function or a parameter has none."""
    function = _described(tool["function"])
    parameters = function.get("parameters", {})
    if isinstance(properties := parameters.get("properties"), dict):
        described = {name: _described(schema) for name, schema in properties.items()}
        function["parameters"] = {**parameters, "properties": described}
    return {**tool, "function": function}


def _described(value: Any) -> Any:
    return {"description": "", **value} if isinstance(value, dict) else value


def _write_calls(message: Message) -> Message:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if not calls:
        return message
    text = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    others = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**others, "content": append_text(message["content"], text, "\n\n")}


def append_text(content: Any, text: str, separator: str = "") -> Any:
    """Append text to a content, which is a string, a list of parts, or None."""
    if isinstance(content, list):
        return [*content, {"type": "text", "text": text}]
    return f"{content}{separator}{text}" if content else text
