"""Render chat messages to the prompt format that the model was trained on, with the model's own Jinja template."""

from collections.abc import Callable, Sequence
from typing import Any

from server.text.parsers.harmony import ANALYSIS_TAGS, HARMONY, is_harmony
from server.text.parsers.reasoning_parser import detect_reasoning_tags
from server.text.parsers.tool_formats import detect_tool_format
from server.text.templates.sandbox import TemplateEnvironment, describe_error, join_bounded
from server.text.templates.template_options import find_options, find_variables

Message = dict[str, Any]

END = "\U0010fffd"  # a private-use character that marks the end of the final message


class ChatTemplateError(ValueError):
    """An invalid template, or messages that it cannot render. The message is safe to send to a client."""


class ChatTemplate:
    """A compiled chat template. It is immutable, so several threads can render at once.

    Attributes:
        variables: names of the variables that the template reads.
        options: names of the variables that a request can set.
        tool_format, reasoning_tags: how the model writes tool calls and reasoning, detected from the template.
        is_harmony: whether the conversation is in the harmony format.
        keeps_system_position: whether a system message between other turns is rendered in its position.
    """

    def __init__(self, source: str, *, bos_token: str | None, eos_token: str | None) -> None:
        """Raises ChatTemplateError if the source does not compile."""
        self.source = source
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        environment = TemplateEnvironment()
        try:
            self._template = environment.from_string(source)
            parsed = environment.parse(source)
            self.variables, self.options = find_variables(parsed), find_options(parsed)
        except Exception as error:  # RecursionError and SyntaxError too
            raise ChatTemplateError(f"The chat template does not compile: {describe_error(error)}.") from error
        self.tool_format = detect_tool_format(source)
        self.reasoning_tags = detect_reasoning_tags(source)
        self._converters = {role: self._choose_converter(role) for role in ("user", "system", "assistant")}
        self.keeps_system_position = self._keeps_system_position()
        self.is_harmony = is_harmony(self._probe("assistant", "x"))
        if self.is_harmony:
            self.tool_format, self.reasoning_tags = HARMONY, ANALYSIS_TAGS

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
        """
        converted = [self._convert_content(message) for message in messages]
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
        prompt = self._render({"documents": None, **extra, **variables})
        return _cut_at_end(prompt) if continue_final_message else prompt

    def _render(self, variables: dict[str, Any]) -> str:
        try:
            return join_bounded(self._template.generate(variables))
        except Exception as error:  # a template can raise anything, RecursionError and MemoryError too
            raise ChatTemplateError(
                f"The chat template cannot render this request: {describe_error(error)}."
            ) from error

    def _convert_content(self, message: Message) -> Message:
        if "content" not in message:
            return message
        convert = self._converters.get(message.get("role", ""), self._converters["user"])
        content = message["content"]
        if isinstance(content, list):
            _check_parts(content)
        return {**message, "content": convert("" if content is None else content)}

    def _choose_converter(self, role: str) -> Callable[[Any], Any]:
        """Render test messages to find out which forms of content the template handles for this role."""
        text = "lightwell"
        from_string = self._probe(role, text)
        from_parts = self._probe(role, _to_parts(text))
        if text in from_string:
            return _keep if from_parts == from_string else _to_string
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
            return self._render({**self._tokens, "messages": messages, "tools": None, "documents": None})
        except ChatTemplateError:
            return ""


def _keep(content: Any) -> Any:
    return content


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
