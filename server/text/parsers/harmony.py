"""Parse answers in the harmony format of gpt-oss, which arrive in pieces: a list of messages with headers.

    <|channel|>analysis<|message|>reasoning<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{arguments}<|call|>
    <|start|>assistant<|channel|>final<|message|>content<|return|>

The prompt ends with `<|start|>assistant`. Messages in the channel `analysis`, and code for the built-in tools that the
model was trained with, are reasoning. Messages to a tool of the request are calls if they begin with a brace. All other
messages are content, as is text that is no message. https://github.com/openai/harmony/blob/main/docs/format.md
"""

import re
from collections.abc import Sequence

from server.text.parsers.answer_parser import AnswerFormat
from server.text.parsers.answer_parts import AnswerPart, PartKind
from server.text.parsers.json_scanner import JSONScanner
from server.text.parsers.markers import Markers
from server.text.parsers.reasoning_parser import ReasoningTags
from server.text.parsers.tool_formats import ToolFormat

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"  # the last two are end tokens of the model
ENDS = (END, CALL, RETURN)
MARKERS = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
NAMESPACE = "functions."  # of the request's tools
BUILTIN_TOOLS = ("python", "browser", "container")

HARMONY = ToolFormat("harmony", start=f"{CHANNEL}commentary to={NAMESPACE}", end=CALL)
ANALYSIS_TAGS = ReasoningTags(f"{CHANNEL}analysis{MESSAGE}", END)

MAX_HEADER_CHARS = 1024
SEPARATOR = "\n\n"  # between two messages that become one content or one reasoning

_ALL = Markers(MARKERS)
_HEADER_ENDS = Markers((MESSAGE, *ENDS))
_HEADER_STARTS = (*MARKERS, "to=")
_CHANNEL = re.compile(rf"{re.escape(CHANNEL)}\s*([^\s<]*)")
_RECIPIENT = re.compile(r"(?:^|[\s>])to=([^\s<]+)")
# What a header consists of. The type of the message may follow without its marker.
_HEADER_WORDS = re.compile(
    r"<\|start\|>\s?[^\s<]*|<\|(?:channel|constrain)\|>\s*[^\s<]*|(?:^|(?<=\s))to=[^\s<]*|(?<=\s)(?:json|code)\b"
)


def is_harmony(prompt: str) -> bool:
    """Return whether a rendered conversation that has a turn of an assistant is in the harmony format."""
    return f"{START}assistant{CHANNEL}final{MESSAGE}" in prompt


class HarmonyFormat(AnswerFormat, frozen=True, tag=True):
    """The parts of an answer in the harmony format."""

    tool_format: ToolFormat = HARMONY
    reasoning_tags: ReasoningTags | None = ANALYSIS_TAGS
    is_final: bool = False  # the prompt ends inside a message with content

    @property
    def markers(self) -> tuple[str, ...]:
        return MARKERS

    def new_parser(self, *, hidden: Sequence[str] = ()) -> "HarmonyParser":
        return HarmonyParser(self, hidden=hidden)


class HarmonyParser:
    """Splits the text of one choice into its parts as it arrives.

    A state machine like `ToolParser`: each state is a method that returns False if it needs more text. As there, the
    arguments of a call end with the matching brace, whatever markers their strings contain.
    """

    def __init__(self, format: HarmonyFormat, *, hidden: Sequence[str] = ()) -> None:
        """`hidden` are markers to remove from content and reasoning."""
        self.format = format
        self._hidden = Markers(hidden)
        self._state = self._body if format.is_final else self._header
        self._kind = PartKind.CONTENT  # of the current message
        self._is_new = False  # nothing of the current message has been returned yet
        self._kinds: set[PartKind] = set()  # kinds of the parts so far
        self._buffer = ""  # unread text
        self._scanner = JSONScanner()
        self._name = ""  # of the tool that the current message calls
        self._num_calls = 0
        self._parts: list[AnswerPart] = []

    @property
    def is_reasoning(self) -> bool:
        return self._state == self._body and self._kind is PartKind.REASONING

    @property
    def is_holding(self) -> bool:
        """True if text is held back because its part is not determined yet."""
        return bool(self._buffer)

    @property
    def num_held(self) -> int:
        """Number of characters held back."""
        return len(self._buffer)

    @property
    def ends_with_calls(self) -> bool:
        """True if the client should call tools: there are calls, and all are complete."""
        return self._num_calls > 0 and self._state != self._arguments

    def push(self, text: str) -> list[AnswerPart]:
        """Read the next piece of text; return the parts that it completes."""
        self._buffer += text
        while self._state():
            pass
        return self._take_parts()

    def finish(self) -> list[AnswerPart]:
        """Return the parts of the text that was held back. Call it after the last piece of text."""
        rest = self._read(len(self._buffer))
        self._add_text(_without_header(rest) if self._state == self._header else rest)
        return self._take_parts()

    # The states. Each returns False if it needs more text, and True to run the next state.

    def _header(self) -> bool:
        """Read the header of a message, or find that the text has none."""
        beginning = self._buffer.lstrip()[: len(CONSTRAIN)]
        if not any(start.startswith(beginning) or beginning.startswith(start) for start in _HEADER_STARTS):
            return self._begin(PartKind.CONTENT)
        match = _HEADER_ENDS.find(self._buffer)
        num_chars = len(self._buffer) - _HEADER_ENDS.num_partial(self._buffer) if match is None else match.start()
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
        if not self._buffer:
            return False
        self._buffer = self._buffer.removeprefix(" ")
        self._state = self._body
        return True

    def _body(self) -> bool:
        """Read a message up to its end."""
        match = _ALL.find(self._buffer)
        if match is None:
            self._add_text(self._read(len(self._buffer) - _ALL.num_partial(self._buffer)))
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
        if self._buffer[0] != "{":
            self._state = self._body
            return True
        self._num_calls += 1
        self._scanner = JSONScanner()
        self._parts.append(AnswerPart(PartKind.CALL, self._name))
        self._state = self._arguments
        return True

    def _arguments(self) -> bool:
        """Read the arguments of a call."""
        end = self._scanner.advance(self._buffer, 0)
        if text := self._read(len(self._buffer) if end is None else end):
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
        if self._name in self.format.tool_names and (self.format.parallel_calls or self._num_calls == 0):
            self._state = self._before_arguments
        return True

    def _read(self, num_chars: int) -> str:
        """Remove characters from the buffer and return them."""
        text, self._buffer = self._buffer[:num_chars], self._buffer[num_chars:]
        return text

    def _skip_space(self) -> bool:
        """Remove white space from the buffer; return whether other text follows it."""
        self._buffer = self._buffer.lstrip()
        return bool(self._buffer)

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
