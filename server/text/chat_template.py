"""Chat messages to the prompt that the model was trained on: the model's own Jinja template, in a sandbox.

Whose text is a control token? A chat template and its messages meet in one string, and a tokenizer reads every
`<|im_end|>` in it as the control token, also one that a user typed. So `encode_chat` renders with guards: in everything
that comes from the request, the characters with which control tokens begin and end are replaced, one for one, by
private characters that occur nowhere else. What still spells a control token has its first and its last character from
the template and is meant as one; everything else is encoded as plain text. A tokenizer cuts text at control tokens
before it does anything else, and `encode_chat` cuts at the template's own, so the ids are those of a tokenizer to which
the request's text never was special.

The template is the model's or the operator's, never a client's. The sandbox keeps it from Python's internals and bounds
`range()`, powers, repetitions and the length of the output, but nested loops may still take very long.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

from server.text.reasoning import detect_think_tags
from server.text.template_options import find_options, find_variables
from server.text.tool_formats import detect_tool_format

Message = dict[str, Any]

MAX_PROMPT_CHARS = 1 << 24  # of one rendered conversation
MAX_DEPTH = 100  # of lists and objects in a request
MAX_REASON_CHARS = 200  # of a template's own error message
END = "\U0010fffd"  # a private character: where the final message ends


class ChatTemplateError(ValueError):
    """The template is no valid one, or it cannot render these messages. The text is safe to send to a client."""


class ChatTokenizer(Protocol):
    """What encoding a chat needs of a tokenizer."""

    @property
    def special_tokens(self) -> tuple[str, ...]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]: ...


class ChatTemplate:
    """A compiled chat template. It does not change once made, so any number of threads may render at once.

    Attributes:
        variables: names that the template reads.
        options: those of them that a request may set, beside what is always there.
        tool_format, think_tags: in which form the model calls tools and thinks, as far as the template shows it.
        places_system: whether a system message between other turns is written where it stands.
    """

    def __init__(self, source: str, *, bos_token: str | None, eos_token: str | None) -> None:
        """Raises ChatTemplateError if the source does not compile."""
        self.source = source
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        environment = _Environment()
        try:
            self._template = environment.from_string(source)
            parsed = environment.parse(source)
            self.variables, self.options = find_variables(parsed), find_options(parsed)
        except Exception as error:  # RecursionError and SyntaxError too
            raise ChatTemplateError(f"The chat template does not compile: {_reason(error)}.") from error
        self.tool_format = detect_tool_format(source)
        self.think_tags = detect_think_tags(source)
        self._fit_by_role = {role: self._choose_fit(role) for role in ("user", "system", "assistant")}
        self.places_system = self._probe_system()

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt as text; raises ChatTemplateError.

        With `continue_final_message` it ends where the content of the last message ends.

        A content is a string or a list of text parts, and the template gets it in the form that it handles: parts are
        joined by newlines for a template that takes only strings, and a string becomes one part where it takes only
        parts. A content of None becomes the empty string. `template_kwargs` are further variables for the template.
        """
        fitted = [self._fit_content(message) for message in messages]
        if continue_final_message:
            fitted[-1] = _mark_end(fitted[-1])
        variables = {
            **self._tokens,
            "messages": fitted,
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
            return _join_bounded(self._template.generate(variables))
        except Exception as error:  # a template can raise anything, RecursionError and MemoryError too
            raise ChatTemplateError(f"The chat template cannot render this: {_reason(error)}.") from error

    def _fit_content(self, message: Message) -> Message:
        if "content" not in message:
            return message
        fit = self._fit_by_role.get(message.get("role", ""), self._fit_by_role["user"])
        content = message["content"]
        if isinstance(content, list):
            _check_parts(content)
        return {**message, "content": fit("" if content is None else content)}

    def _choose_fit(self, role: str) -> Callable[[Any], Any]:
        """Try out which forms of content the template handles for this role."""
        text = "lightwell"
        from_string = self._probe(role, text)
        from_parts = self._probe(role, _to_parts(text))
        if text in from_string:
            return _keep if from_parts == from_string else _to_string
        return _to_parts if text in from_parts else _to_string

    def _probe_system(self) -> bool:
        """Some templates refuse it there, leave it out, or move it to the beginning."""
        roles = ("system", "user", "system", "assistant", "system", "user", "system")
        texts = [f"lightwell-{index}" for index in range(len(roles))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        try:
            prompt = self.render(messages, add_generation_prompt=False)
        except ChatTemplateError:
            return False
        places = [prompt.find(text) for text in texts]
        return -1 not in places and places == sorted(places)

    def _probe(self, role: str, content: Any) -> str:
        roles = {"user": ("user",), "system": ("system", "user"), "assistant": ("user", "assistant")}[role]
        filler = "x" if isinstance(content, str) else _to_parts("x")
        messages = [{"role": each, "content": content if each == role else filler} for each in roles]
        try:
            return self._render({**self._tokens, "messages": messages, "tools": None, "documents": None})
        except ChatTemplateError:
            return ""


def encode_chat(
    template: ChatTemplate,
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """The prompt as token ids; raises ChatTemplateError.

    No text of the request (messages, tools, template_kwargs) becomes a control token. Where none spells one, the ids
    are those of the whole rendered prompt. Nothing is put before it: a template that wants a BOS token writes it.
    """

    def render(guard: Callable[[str], str]) -> str:
        return template.render(
            _map_strings(guard, messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=_map_strings(guard, tools),
            template_kwargs=_map_strings(guard, template_kwargs),
        )

    special = _special_tokens(tokenizer.special_tokens)
    request_text = "".join(_strings([messages, tools, template_kwargs]))
    if not special.may_begin_or_end_in(request_text):
        return tokenizer.encode(render(_keep), add_special_tokens=False, parse_special=True)
    guards = _Guards(special, used_chars=request_text + template.source)
    # Templates look into contents (`'</think>' in content`), so as little as possible is hidden from them.
    prompt = render(guards.guard_tokens)
    fully_guarded = render(guards.guard_ends)
    if special.find(prompt) != special.find(fully_guarded):  # a token was put together from pieces of the request
        prompt = fully_guarded
    return _encode_guarded(tokenizer, prompt, special, guards)


@dataclass(frozen=True)
class _SpecialTokens:
    pattern: re.Pattern[str]  # any of them, the longest where several begin at one place
    ends: frozenset[str]  # their first and last characters
    punctuation: frozenset[str]  # those of `ends` that are no letters, digits or white space

    def find(self, text: str) -> list[str]:
        return self.pattern.findall(text)

    def may_begin_or_end_in(self, text: str) -> bool:
        return any(char in text for char in self.punctuation) or self.pattern.search(text) is not None


@functools.lru_cache(maxsize=4)  # some vocabularies have thousands
def _special_tokens(tokens: tuple[str, ...]) -> _SpecialTokens:
    tokens = tuple(filter(None, tokens))
    ends = frozenset(token[i] for token in tokens for i in (0, -1))
    punctuation = frozenset(char for char in ends if not (char.isalnum() or char.isspace()))
    return _SpecialTokens(re.compile(_trie_pattern(tokens) if tokens else "(?!)"), ends, punctuation)


def _trie_pattern(words: Iterable[str]) -> str:
    """A pattern for the longest of the words, that looks at each character of the text once."""
    rests: dict[str, list[str]] = {}
    for word in words:
        rests.setdefault(word[:1], []).append(word[1:])
    is_word = rests.pop("", None) is not None
    branches = [re.escape(char) + _trie_pattern(rest) for char, rest in rests.items()]
    if len(branches) <= 1 and not is_word:
        return "".join(branches)
    return f"(?:{'|'.join(branches)}){'?' if is_word else ''}"


class _Guards:
    """Private characters that stand for those with which special tokens begin and end."""

    def __init__(self, special: _SpecialTokens, *, used_chars: str) -> None:
        private_use = map(chr, range(0xF0000, 0xFFFFE))
        used = set(used_chars)
        unused = itertools.islice((char for char in private_use if char not in used), len(special.ends))
        self._guard_of = dict(zip(sorted(special.ends), unused, strict=False))
        if len(self._guard_of) < len(special.ends):
            raise ChatTemplateError("The messages use up all private characters.")
        self._special = special
        self._any_guard = re.compile(f"[{''.join(self._guard_of.values())}]")

    def guard_tokens(self, text: str) -> str:
        """Guard the special tokens that the text spells."""
        return self._special.pattern.sub(lambda match: self._guard_token(match[0]), text)

    def guard_ends(self, text: str) -> str:
        """Guard also each character with which a special token could begin or end."""
        text = self.guard_tokens(text)
        for char in self._special.punctuation:
            text = text.replace(char, self._guard_of[char])
        return text

    def are_in(self, text: str) -> bool:
        return self._any_guard.search(text) is not None

    def remove(self, text: str) -> str:
        for char, guard in self._guard_of.items():
            text = text.replace(guard, char)
        return text

    def _guard_token(self, token: str) -> str:
        if len(token) == 1:
            return self._guard_of[token]
        return self._guard_of[token[0]] + token[1:-1] + self._guard_of[token[-1]]


def _encode_guarded(tokenizer: ChatTokenizer, prompt: str, special: _SpecialTokens, guards: _Guards) -> list[int]:
    """Encode a guarded prompt: cut at the template's special tokens, and stretches with guards as plain text."""
    token_ids: list[int] = []
    start = 0  # of what is not encoded yet
    for begin, end in _stretches(prompt, special.pattern):
        if guards.are_in(prompt[begin:end]):
            token_ids += tokenizer.encode(prompt[start:begin], add_special_tokens=False, parse_special=True)
            encode_plain = _encode_inside if begin > 0 else _encode_plain
            token_ids += encode_plain(tokenizer, guards.remove(prompt[begin:end]))
            start = end
    return token_ids + tokenizer.encode(prompt[start:], add_special_tokens=False, parse_special=True)


def _stretches(text: str, separator: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    begin = 0
    for match in separator.finditer(text):
        yield begin, match.start()
        begin = match.end()
    yield begin, len(text)


def _encode_plain(tokenizer: ChatTokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, parse_special=False)


def _encode_inside(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Encode text that follows a special token.

    Some tokenizers put a space before a prompt, but not after a special token in it. There the text is encoded after a
    newline, which is then taken away.
    """
    special_token = tokenizer.special_tokens[0]
    after_special = tokenizer.encode(special_token + "x", add_special_tokens=False, parse_special=True)[1:]
    if after_special != _encode_plain(tokenizer, "x"):
        newline_ids = _encode_plain(tokenizer, "\n")
        token_ids = _encode_plain(tokenizer, "\n" + text)
        if token_ids[: len(newline_ids)] == newline_ids:
            return token_ids[len(newline_ids) :]
    return _encode_plain(tokenizer, text)


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    """All strings in JSON-like data, keys included."""
    if depth > MAX_DEPTH:
        raise ChatTemplateError(f"The messages or tools are nested more than {MAX_DEPTH} levels deep.")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value.keys(), *value.values()], depth)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, depth + 1)


def _map_strings(function: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {_map_strings(function, key): _map_strings(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(function, item) for item in value]
    return value


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
        raise ChatTemplateError("The chat template does not write the final message as it is, once.")
    return prompt[: prompt.index(END)]


def _join_bounded(pieces: Iterable[str]) -> str:
    parts, num_chars = [], 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > MAX_PROMPT_CHARS:
            raise OverflowError(f"more than {MAX_PROMPT_CHARS} characters")
        parts.append(piece)
    return "".join(parts)


class _Refusal(jinja2.TemplateError):
    """What a template's `raise_exception` raises."""


def _reason(error: Exception) -> str:
    """Why a template failed, without anything that a client should not see."""
    match error:
        case _Refusal():
            return " ".join(str(error).split())[:MAX_REASON_CHARS].rstrip(".")
        case jinja2.TemplateSyntaxError():
            return f"line {error.lineno}: {error.message}".rstrip(".")
        case SecurityError():
            return "it does what the sandbox forbids"
        case jinja2.UndefinedError():
            return "a field that it needs is missing"
        case RecursionError() | OverflowError() | MemoryError():
            return "it grows too large or nests too deeply"
    return "a value is not of the form that it expects"


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face's chat templates expect it."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if (_product_size if operator == "*" else _power_size)(left, right) > MAX_RANGE:
            raise OverflowError(f"{operator} grows too large")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}` marks an assistant's turn for training; for us it is its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _product_size(left: Any, right: Any) -> int:
    """Items of a repetition, bits of a product of integers."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    if isinstance(right, int):
        left, right = right, left
    return left * len(right) if isinstance(left, int) and hasattr(right, "__len__") else 0


def _power_size(left: Any, right: Any) -> int:
    return left.bit_length() * right if isinstance(left, int) and isinstance(right, int) else 0


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which models never saw."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
