"""Hostile and broken templates fail with a ChatTemplateError, and reach nothing outside the sandbox."""

from typing import Any

import pytest

from server.text.templates.sandbox import ChatTemplateError
from tests.support.chat_templates import CHAT, chat_template, user

ESCAPES = [
    "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages[0]['content']['__class__'] }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__class__}' | attr('format'))(messages) }}",
    "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ (messages | map('format') | list) }}{{ messages | attr('append') }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.checklist("B10")
@pytest.mark.parametrize("escape", ESCAPES)
def test_sandbox_holds(escape: str) -> None:
    messages = user("x")
    shown = rendered_or_error(escape, messages)
    assert not any(leak in shown for leak in ("<class", "<function", "built-in", "uid=", "root:", "/usr", "subprocess"))
    assert messages == user("x")


def rendered_or_error(source: str, messages: list[dict[str, Any]]) -> str:
    try:
        return chat_template(source).render(messages)
    except ChatTemplateError as error:
        return str(error)


@pytest.mark.checklist("B10")
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * [1] }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(x=10**30) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
    ],
)
def test_hostile_sizes_end_as_errors(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="too large or too deeply nested"):
        chat_template(source).render(CHAT)


@pytest.mark.checklist("C20")
@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.nothing.more }}",
        "{{ messages[99].content + 'x' }}",
        "{{ nothing() }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages | tojson(indent={}) }}",
        "{{ '%d' % 'x' }}",
        "{{ [] | first | upper + {} }}",
    ],
)
def test_any_error_is_a_chat_template_error(source: str) -> None:
    secret = "canary"
    with pytest.raises(ChatTemplateError) as error:
        chat_template(source).render(user(secret))
    assert secret not in str(error.value)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% nothing %}", "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}"])
def test_source_that_does_not_compile(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="does not compile"):
        chat_template(source)
