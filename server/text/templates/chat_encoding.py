"""Encode chat messages to token ids, without letting text of the request become control tokens.

A chat template joins its own text and the text of the request in one string, and a tokenizer reads every `<|im_end|>`
in it as the control token, even one that a user typed. Therefore `encode_chat` renders the template with guards: in all
text of the request, the first and last characters of control tokens are replaced, one for one, by private-use
characters that occur nowhere else. A control token in the rendered prompt then has its first and last character from
the template and is meant as one; everything else is encoded as plain text. A tokenizer splits text at control tokens
before anything else, and `encode_chat` splits it at those of the template, so the ids are those of a tokenizer for
which the request's text is never special.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.templates.chat_template import ChatTemplate, Message
from server.text.templates.sandbox import ChatTemplateError
from server.text.templates.tool_probe import num_common
from server.text.tokenizer import Tokenizer

MAX_DEPTH = 100  # of lists and objects in a request
MAX_BRANCHINGS = 16  # of a pattern; the library compiles patterns recursively


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
    check_prompt: Callable[[str], None] | None = None,
) -> list[int]:
    """Render and tokenize the prompt. `check_prompt` gets the rendered prompt before that is tokenized, and may raise.

    No text of the request (messages, tools, template_kwargs) becomes a control token. If none of it contains one, the
    ids are those of the whole rendered prompt. No BOS token is prepended: a template that needs one writes it.

    Raises:
        ChatTemplateError: the template cannot render the request, or the request is too deeply nested.
        TemplateLimitError: rendering takes too long.
    """

    special = _special_tokens(tokenizer.special_tokens)
    request_text = "".join(_strings([messages, tools, template_kwargs]))
    render = functools.partial(
        template.render, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
    )
    if not special.may_begin_or_end_in(request_text):
        prompt = render(messages, tools=tools, template_kwargs=template_kwargs)
        if check_prompt is not None:
            check_prompt(prompt)
        return tokenizer.encode(prompt, add_special_tokens=False, parse_special=True)

    def guarded(guard: Callable[[str], str]) -> str:
        return render(
            _map_strings(guard, messages),
            tools=_map_strings(guard, tools),
            template_kwargs=_map_strings(guard, template_kwargs),
        )

    guards = _Guards(special, used_chars=request_text + template.source)
    # Templates search contents (`'</think>' in content`), so as few characters as possible are replaced at first.
    prompt = guarded(guards.guard_tokens)
    fully_guarded = guarded(guards.guard_ends)
    if special.find(prompt) != special.find(fully_guarded):  # the template joined pieces of the request to a token
        prompt = fully_guarded
    if check_prompt is not None:
        check_prompt(guards.remove(prompt))
    return _encode_guarded(tokenizer, prompt, special, guards)


@dataclass(frozen=True)
class _SpecialTokens:
    pattern: re.Pattern[str]  # matches any of the tokens, preferring the longest
    ends: frozenset[str]  # first and last characters of the tokens
    punctuation: frozenset[str]  # the characters of `ends` that are not letters, digits or white space

    def find(self, text: str) -> list[str]:
        return self.pattern.findall(text)

    def may_begin_or_end_in(self, text: str) -> bool:
        """Return whether the text contains a token, or a punctuation character with which one begins or ends."""
        return any([char in text for char in self.punctuation]) or self.pattern.search(text) is not None


@functools.lru_cache(maxsize=4)  # some vocabularies have thousands of special tokens
def _special_tokens(tokens: tuple[str, ...]) -> _SpecialTokens:
    tokens = tuple(filter(None, tokens))
    ends = frozenset(token[i] for token in tokens for i in (0, -1))
    punctuation = frozenset(char for char in ends if not (char.isalnum() or char.isspace()))
    return _SpecialTokens(re.compile(_trie_pattern(tokens) if tokens else "(?!)"), ends, punctuation)


def _trie_pattern(words: Sequence[str], depth: int = 0) -> str:
    """Return a pattern that matches the longest of the words.

    It reads each character of the text once, up to `MAX_BRANCHINGS` after each other in a word.
    """
    first, last = min(words), max(words)
    prefix = first[: num_common(first, last)]
    rests: dict[str, list[str]] = {}
    for rest in sorted((word[len(prefix) :] for word in words), key=len, reverse=True):
        rests.setdefault(rest[:1] if depth < MAX_BRANCHINGS else rest, []).append(rest)
    is_word = rests.pop("", None) is not None
    branches = [_trie_pattern(rest, depth + 1) for rest in rests.values()]
    if not branches:
        return re.escape(prefix)
    return f"{re.escape(prefix)}(?:{'|'.join(branches)}){'?' if is_word else ''}"


class _Guards:
    """Private-use characters that replace the first and last characters of special tokens."""

    def __init__(self, special: _SpecialTokens, *, used_chars: str) -> None:
        private_use = map(chr, range(0xF0000, 0xFFFFE))
        used = set(used_chars)
        unused = itertools.islice((char for char in private_use if char not in used), len(special.ends))
        self._guard_of = dict(zip(sorted(special.ends), unused, strict=False))
        if len(self._guard_of) < len(special.ends):
            raise ChatTemplateError("The messages contain too many different private-use characters.")
        self._special = special
        self._any_guard = re.compile(f"[{''.join(self._guard_of.values())}]")

    def guard_tokens(self, text: str) -> str:
        """Replace the first and last character of each special token in the text."""
        return self._special.pattern.sub(lambda match: self._guard_token(match[0]), text)

    def guard_ends(self, text: str) -> str:
        """Replace what `guard_tokens` does, and each punctuation character that begins or ends a special token."""
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


def _encode_guarded(tokenizer: Tokenizer, prompt: str, special: _SpecialTokens, guards: _Guards) -> list[int]:
    """Split a guarded prompt at the template's special tokens, and encode the spans with guards as plain text."""
    token_ids: list[int] = []
    start = 0  # index of the first character that is not encoded yet
    for begin, end in _spans_between(prompt, special.pattern):
        if guards.are_in(prompt[begin:end]):
            token_ids += tokenizer.encode(prompt[start:begin], add_special_tokens=False, parse_special=True)
            plain = guards.remove(prompt[begin:end])
            token_ids += _encode_after_special(tokenizer, plain) if begin > 0 else tokenizer.encode_plain(plain)
            start = end
    return token_ids + tokenizer.encode(prompt[start:], add_special_tokens=False, parse_special=True)


def _spans_between(text: str, separator: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    begin = 0
    for match in separator.finditer(text):
        yield begin, match.start()
        begin = match.end()
    yield begin, len(text)


def _encode_after_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode plain text that follows a special token. Some tokenizers put a space before a text, but not there."""
    special_token = tokenizer.special_tokens[0]
    after_special = tokenizer.encode(special_token + "x", add_special_tokens=False, parse_special=True)[1:]
    return tokenizer.encode_plain(text, is_continuation=after_special != tokenizer.encode_plain("x"))


def _strings(value: Any) -> list[str]:
    """Return all strings in JSON-like data, keys included. Raises ChatTemplateError if it is nested too deeply."""
    found: list[str] = []
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for each in level:
            if isinstance(each, str):
                found.append(each)
            elif isinstance(each, dict):
                found += [key for key in each if isinstance(key, str)]
                below += each.values()
            elif isinstance(each, list | tuple):
                below += each
        if not below:
            return found
        level = below
    raise ChatTemplateError(f"The messages or tools are nested more than {MAX_DEPTH} levels deep.")


def _map_strings(function: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {_map_strings(function, key): _map_strings(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(function, item) for item in value]
    return value
