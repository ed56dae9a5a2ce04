"""The harmony format of gpt-oss: prompts, the parser and the grammar of answers, which are messages with headers.

    <|channel|>analysis<|message|>reasoning<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{arguments}<|call|>
    <|start|>assistant<|channel|>final<|message|>content<|return|>

The prompt ends with `<|start|>assistant`. Messages in the channel `analysis`, and code for the built-in tools that the
model was trained with, are reasoning. Messages to a tool of the request are calls if they begin with a brace. All other
messages are content, as is text that is no message. https://github.com/openai/harmony/blob/main/docs/format.md
"""

import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from server.text.parsers.answer_parser import AnswerFormat, ReasoningTags
from server.text.parsers.answer_parts import AnswerPart, JSONScanner, PartKind, PieceReader
from server.text.parsers.markers import Markers, MarkerWriter
from server.text.parsers.tool_formats import ToolFormat

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"  # the last two are end tokens of the model
ENDS = (END, CALL, RETURN)
MARKERS = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
NAMESPACE = "functions."  # of the request's tools
BUILTIN_TOOLS = ("python", "browser", "container")

HARMONY_FORMAT = ToolFormat("harmony", start=f"{CHANNEL}commentary to={NAMESPACE}", end=CALL)
ANALYSIS_TAGS = ReasoningTags(f"{CHANNEL}analysis{MESSAGE}", END)

MAX_HEADER_CHARS = 1024
SEPARATOR = "\n\n"  # between two texts that become one content or one reasoning

# Efforts that the model was not trained on -> the nearest one.
EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}

Message = dict[str, Any]

_ALL = Markers(MARKERS)
_HEADER_ENDS = Markers((MESSAGE, *ENDS))
_HEADER_STARTS = (*MARKERS, "to=")
_CHANNEL = re.compile(rf"{re.escape(CHANNEL)}\s*([^\s<]*)")
_RECIPIENT = re.compile(r"(?:^|[\s>])to=([^\s<]+)")
# What a header consists of. The type of the message may follow without its marker.
_HEADER_WORDS = re.compile(
    r"<\|start\|>\s?[^\s<]*|<\|(?:channel|constrain)\|>\s*[^\s<]*|(?:^|(?<=\s))to=[^\s<]*|(?<=\s)(?:json|code)\b"
)


class HarmonyFormat(AnswerFormat, frozen=True, tag=True):
    """The parts of an answer in the harmony format."""

    tool_format: ToolFormat = HARMONY_FORMAT
    reasoning_tags: ReasoningTags | None = ANALYSIS_TAGS
    is_final: bool = False  # the prompt ends inside a message with content

    @property
    def markers(self) -> tuple[str, ...]:
        return MARKERS

    def new_parser(self, *, hidden: Sequence[str] = ()) -> "HarmonyParser":
        return HarmonyParser(self, hidden=hidden)

    def answer_rules(
        self, markers: MarkerWriter, names: Sequence[str], *, is_forced: bool, has_content_grammar: bool
    ) -> list[str]:
        """Return the rules of an answer: free reasoning, then content, or one call, which ends the model's turn."""
        start, channel, constrain, message = (
            f'{markers.write(each)} " "?' for each in (START, CHANNEL, CONSTRAIN, MESSAGE)
        )
        content = "@content" if has_content_grammar else "TEXT"
        # With a grammar for content, a message before a call would be content that does not follow it.
        earlier = ["analysis"] if has_content_grammar else ["analysis", "commentary"]
        last = ([] if is_forced else [f"final {content}"]) + [f"call_{index}" for index in range(len(names))]
        whole = "answer"
        if self.is_final:
            whole = (
                "text_end answer" if is_forced else content if has_content_grammar else f"{content} | text_end answer"
            )
        recipients = [json.dumps(f" to={NAMESPACE}{name}") for name in names]
        headers = [f'({channel} "commentary" {to} | {to} {channel} "commentary") type? {message}' for to in recipients]
        return [
            f"start: {whole}",
            f"answer: earlier* ({' | '.join(last)})",
            f"earlier: {channel} ({' | '.join(map(json.dumps, earlier))}) {message} text_end",
            f'text_end: text {start} "assistant"',
            markers.up_to("text", "TEXT", END),
            f'final: {channel} "final" type? {message}',
            f'type: " "? {constrain} "json" | " json"',
            *(f"call_{index}: {header} args_{index}" for index, header in enumerate(headers)),
        ]


class HarmonyParser(PieceReader):
    """Splits the text of one choice into its parts as it arrives.

    The arguments of a call end with the matching brace, whatever markers their strings contain.
    """

    def __init__(self, format: HarmonyFormat, *, hidden: Sequence[str] = ()) -> None:
        """`hidden` are markers to remove from content and reasoning."""
        super().__init__(self._body if format.is_final else self._header)
        self.format = format
        self._hidden = Markers(hidden)
        self._kind = PartKind.CONTENT  # of the current message
        self._is_new = False  # nothing of the current message has been returned yet
        self._kinds: set[PartKind] = set()  # kinds of the parts so far
        self._scanner = JSONScanner()
        self._name = ""  # of the tool that the current message calls
        self._num_calls = 0
        self._parts: list[AnswerPart] = []

    @property
    def is_reasoning(self) -> bool:
        return self._state == self._body and self._kind is PartKind.REASONING

    @property
    def num_held(self) -> int:
        """Number of characters held back."""
        return len(self.unread)

    @property
    def ends_with_calls(self) -> bool:
        """True if the client should call tools: there are calls, and all are complete."""
        return self._num_calls > 0 and self._state != self._arguments

    def push(self, text: str) -> list[AnswerPart]:
        """Read the next piece of text; return the parts that it completes."""
        self._run(text)
        return self._take_parts()

    def finish(self) -> list[AnswerPart]:
        """Return the parts of the text that was held back. Call it after the last piece of text."""
        rest = self._read(len(self.unread))
        self._add_text(_without_header(rest) if self._state == self._header else rest)
        return self._take_parts()

    # The states.

    def _header(self) -> bool:
        """Read the header of a message, or find that the text has none."""
        beginning = self.unread.lstrip()[: len(CONSTRAIN)]
        if not any(start.startswith(beginning) or beginning.startswith(start) for start in _HEADER_STARTS):
            return self._begin(PartKind.CONTENT)
        match = _HEADER_ENDS.find(self.unread)
        num_chars = len(self.unread) - _HEADER_ENDS.num_partial(self.unread) if match is None else match.start()
        if num_chars > MAX_HEADER_CHARS:
            self._begin(PartKind.CONTENT)
            self._add_text(self._read(MAX_HEADER_CHARS))
            return True
        if match is None:
            return False
        header = self._read(match.end())
        if match[0] == MESSAGE:
            return self._begin_message(header)
        self._begin(PartKind.CONTENT)
        self._add_text(_without_header(header))
        self._state = self._header
        return True

    def _space(self) -> bool:
        """Remove one space before a message, for models that write a space after each marker (LLM-jp 4)."""
        if not self.unread:
            return False
        self.unread = self.unread.removeprefix(" ")
        self._state = self._body
        return True

    def _body(self) -> bool:
        """Read a message up to its end."""
        match = _ALL.find(self.unread)
        if match is None:
            self._add_text(self._read(len(self.unread) - _ALL.num_partial(self.unread)))
            return False
        self._add_text(self._read(match.start()))
        marker = self._read(len(match[0]))
        if marker in ENDS:
            self._state = self._header
        else:
            self._add_text(marker)
        return True

    def _before_arguments(self) -> bool:
        """Read white space up to the opening brace of a call's arguments, or find that there are none."""
        if not self._skip_space():
            return False
        if self.unread[0] != "{":
            self._state = self._body
            return True
        self._num_calls += 1
        self._scanner = JSONScanner()
        self._parts.append(AnswerPart(PartKind.CALL, self._name))
        self._state = self._arguments
        return True

    def _arguments(self) -> bool:
        """Read the arguments of a call."""
        end = self._scanner.advance(self.unread, 0)
        if text := self._read(len(self.unread) if end is None else end):
            self._parts.append(AnswerPart(PartKind.ARGUMENTS, text))
        if end is None:
            return False
        self._state = self._after_arguments
        return True

    def _after_arguments(self) -> bool:
        """Read white space after a call. Other text of the message is kept."""
        if not self._skip_space():
            return False
        self._state = self._body
        return True

    # Helpers of the states.

    def _begin(self, kind: PartKind) -> bool:
        """Begin a text of this kind."""
        self._kind, self._is_new, self._state = kind, True, self._body
        return True

    def _begin_message(self, header: str) -> bool:
        """Begin the message after a header. Models may repeat parts of the header; the last ones count."""
        channel, recipient = _last(_CHANNEL, header), _last(_RECIPIENT, header)
        is_reasoning = channel == "analysis" or recipient.partition(".")[0] in BUILTIN_TOOLS
        self._begin(PartKind.REASONING if is_reasoning else PartKind.CONTENT)
        self._name = recipient.removeprefix(NAMESPACE)
        if f"{CHANNEL} " in header:
            self._state = self._space
        if self._name in self.format.tools and (self.format.parallel_calls or self._num_calls == 0):
            self._state = self._before_arguments
        return True

    def _add_text(self, text: str) -> None:
        """Add text of the current message, separated from an earlier message of the same kind."""
        text = self._hidden.remove(text)
        if not text:
            return
        separator = SEPARATOR if self._is_new and self._kind in self._kinds else ""
        self._is_new = False
        self._kinds.add(self._kind)
        self._parts.append(AnswerPart(self._kind, separator + text))

    def _take_parts(self) -> list[AnswerPart]:
        parts, self._parts = self._parts, []
        return parts


def _last(pattern: re.Pattern[str], text: str) -> str:
    """Return the last match of the pattern's group, or ""."""
    return next(reversed(pattern.findall(text)), "")


def _without_header(text: str) -> str:
    """Return the text that is left of a header without a message, which may end with a part of a marker."""
    whole = text[: len(text) - _ALL.num_partial(text)]
    return _ALL.remove(_HEADER_WORDS.sub("", whole)).strip() if whole else text


# Prompts. The template of gpt-oss names reasoning `thinking`, reads a system message only at the beginning, renders one
# call per message and no content before a call. https://huggingface.co/openai/gpt-oss-20b/blob/main/chat_template.jinja


def convert(messages: Sequence[Message], options: dict[str, Any]) -> tuple[list[Message], dict[str, Any]]:
    """Return the messages and the variables of a request as the template of gpt-oss expects them."""
    return harmony_messages(messages), harmony_options(options)


def harmony_messages(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with reasoning as `thinking`, and each call in a message of its own before its results.

    All system messages are joined at the beginning.
    """
    system = [_text(message["content"]) for message in messages if message["role"] == "system"]
    written: list[Message] = [{"role": "system", "content": SEPARATOR.join(system)}] if system else []
    turn: list[Message] = []  # the last message that is no result, with its calls in messages of their own
    others = [message for message in messages if message["role"] != "system"]
    for is_result, group in groupby(others, key=lambda message: message["role"] == "tool"):
        if is_result:
            written += _add_results(turn, list(group))
            turn = []
            continue
        for message in group:
            written += turn
            turn = _split_calls(_rename_reasoning(message))
    return written + turn


def harmony_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of the template, with a reasoning effort that the model knows."""
    if (effort := options.get("reasoning_effort")) in EFFORTS:
        return {**options, "reasoning_effort": EFFORTS[effort]}
    return options


def _rename_reasoning(message: Message) -> Message:
    """Return a message with its reasoning as `thinking`. Content before calls becomes part of it."""
    others = {**message}
    reasoning, content = others.pop("reasoning_content", None), message.get("content")
    if message.get("tool_calls"):
        reasoning, others["content"] = SEPARATOR.join(filter(None, (reasoning, _text(content)))), ""
    return {**others, "thinking": reasoning} if reasoning else others


def _text(content: Any) -> str:
    """Return the text of a content, which is a string, a list of parts, or None."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _split_calls(message: Message) -> list[Message]:
    """Return a message for each call, of which the first one has the reasoning."""
    calls = message.get("tool_calls")
    if not calls:
        return [message]
    others = [{"role": message["role"], "content": "", "tool_calls": [call]} for call in calls[1:]]
    return [{**message, "tool_calls": calls[:1]}, *others]


def _add_results(turn: Sequence[Message], results: Sequence[Message]) -> list[Message]:
    """Return the messages of a turn, each followed by the results of its call: by id, or in order if there is none."""
    if not turn:
        return [*results]
    index_of = {call["id"]: i for i, each in enumerate(turn) for call in each.get("tool_calls", ()) if "id" in call}
    groups = [[message] for message in turn]
    for position, result in enumerate(results):
        groups[index_of.get(result.get("tool_call_id"), min(position, len(turn) - 1))].append(result)
    return [message for group in groups for message in group]
