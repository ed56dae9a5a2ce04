"""The sandboxed Jinja environment in which chat templates run.

A template comes from the model or the operator, never from a client. The sandbox blocks access to Python's internals
and limits `range()` and the length of the output. A template can still take very long, and much memory: the part
hardening runs templates in processes of their own.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_PROMPT_CHARS = 1 << 24  # of one rendered conversation
MAX_REASON_CHARS = 200  # of an error message that the template raises
RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"))


class ChatTemplateError(ValueError):
    """An invalid template, or messages that it cannot render. The message is safe to send to a client."""


class TemplateLimitError(ValueError):
    """A template takes too long. The message is safe to send to a client."""


class _TemplateRefusal(jinja2.TemplateError):
    """The exception that a template raises with `raise_exception`."""


def describe_error(error: Exception) -> str:
    """Describe why a template failed, without anything that a client must not see."""
    match error:
        case _TemplateRefusal():
            return " ".join(str(error).split())[:MAX_REASON_CHARS].rstrip(".")
        case jinja2.TemplateSyntaxError():
            return f"line {error.lineno}: {error.message}".rstrip(".")
        case SecurityError():
            return "it does something that the sandbox forbids"
        case jinja2.UndefinedError():
            return "a required field is missing"
        case RecursionError() | OverflowError() | MemoryError():
            return "it is too large or too deeply nested"
    return "a value does not have the expected form"


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """A Jinja environment with the options, filters and functions that Hugging Face's chat templates expect."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        del self.globals["lipsum"]


class SandboxedTemplate:
    """A compiled template, which runs in this process. It is immutable, so several threads can render at once.

    Attributes:
        variables: names of the variables that the template reads.
        options: names of the variables that a request can set.
    """

    def __init__(self, source: str) -> None:
        """Raises ChatTemplateError if the source does not compile."""
        self.source = source
        environment = TemplateEnvironment()
        try:
            self._template = environment.from_string(source)
            parsed = environment.parse(source)
            self.variables, self.options = find_variables(parsed), find_options(parsed)
        except Exception as error:  # RecursionError and SyntaxError too
            raise ChatTemplateError(f"The chat template does not compile: {describe_error(error)}.") from error

    def render(self, variables: dict[str, Any]) -> str:
        """Return the rendered text. Raises ChatTemplateError if the template fails."""
        try:
            return join_bounded(self._template.generate(variables))
        except Exception as error:  # a template can raise anything, RecursionError and MemoryError too
            raise ChatTemplateError(
                f"The chat template cannot render this request: {describe_error(error)}."
            ) from error

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


class _GenerationTag(Extension):
    """The tag `{% generation %}`, which marks an assistant's turn for training. It renders its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: object) -> None:
    raise _TemplateRefusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Convert a value to JSON. Jinja's own filter escapes HTML, which models have not seen in training."""
    value = list(value) if isinstance(value, Iterator) else value  # such as the result of the filter `map`
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def join_bounded(pieces: Iterable[str]) -> str:
    """Join strings. Raises OverflowError if they have more than MAX_PROMPT_CHARS characters."""
    parts, num_chars = [], 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > MAX_PROMPT_CHARS:
            raise OverflowError(f"more than {MAX_PROMPT_CHARS} characters")
        parts.append(piece)
    return "".join(parts)


# The variables of a template.


def find_variables(template: nodes.Template) -> frozenset[str]:
    """Return the names of the variables that the template reads before setting them on some path."""
    return frozenset(meta.find_undeclared_variables(template))


def find_options(template: nodes.Template) -> frozenset[str]:
    """Return the names of the variables that a request can set with `chat_template_kwargs`.

    These are the variables that it reads except the reserved ones. A variable that the template sets itself counts only
    if the template gives it a default.
    """
    own = {name.name for name in template.find_all(nodes.Name) if name.ctx == "store"}
    return find_variables(template) - RESERVED - (own - _with_default(template))


def _with_default(template: nodes.Template) -> set[str]:
    """Return the names that the template tests or defaults: `x is defined`, `x | default(1)`."""
    tests = [test for test in template.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    filters = [each for each in template.find_all(nodes.Filter) if each.name in ("default", "d")]
    return {each.node.name for each in [*tests, *filters] if isinstance(each.node, nodes.Name)}
