"""Hostile and broken templates fail, and reach nothing outside the sandbox; which variables a template reads."""

import pytest

from server.text.templates.sandbox import ChatTemplateError
from tests.support.chat_templates import CHAT, CHATML, LLAMA3, chat_template, user

ESCAPES = [
    "{{ messages.__class__ }}",
    "{{ messages | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages[0]['content']['__class__'] }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__class__}' | attr('format'))(messages) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.checklist("B10")
@pytest.mark.parametrize("escape", ESCAPES)
def test_sandbox_holds(escape: str) -> None:
    messages = user("x")
    try:
        shown = chat_template(escape).render(messages)
    except ChatTemplateError as error:
        shown = str(error)
    assert not any(leak in shown for leak in ("<class", "<function", "built-in", "uid=", "root:", "/usr", "subprocess"))
    assert messages == user("x")


SIZES = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * [1] }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(x=10**30) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endfor %}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
]


@pytest.mark.checklist("B10")
@pytest.mark.parametrize("source", SIZES)
def test_hostile_sizes_end_as_errors(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="too large or too deeply nested"):
        chat_template(source).render(CHAT)


ERRORS = [
    "{{ messages[0].content.nothing.more }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ messages | tojson(indent={}) }}",
]


@pytest.mark.checklist("C20")
@pytest.mark.parametrize("source", ERRORS)
def test_any_error_is_a_chat_template_error(source: str) -> None:
    with pytest.raises(ChatTemplateError) as error:
        chat_template(source).render(user("canary"))
    assert "canary" not in str(error.value)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% nothing %}", "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}"])
def test_source_that_does_not_compile(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="does not compile"):
        chat_template(source)


# The variables that a template reads, and those that a request can set.


OPTIONS = """\
{%- if not date is defined %}{%- set date = strftime_now("%Y") %}{%- endif %}
{%- macro shout(text) %}{{ text | upper }}{{ mark }}{% endmacro %}
{%- set ns = namespace(found=false) %}{%- set unit = unit | default('m') %}
{%- for message in messages %}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ range(2) | list }}{% endif %}
    {%- if loop.first %}{%- set own = '' %}{%- endif %}{{ own }}
    {%- if false %}{{ raise_exception('no') }}{% endif %}{{ shout(message.content) }}{{ '<tool_call>' + '</think>' }}
{%- endfor %}{{ bos_token }}{{ documents }}{% if add_generation_prompt %}{{ tools }}{% endif %}{{ date }}"""


def test_options_are_what_the_template_reads() -> None:
    template = chat_template(OPTIONS)
    assert template.options == {"date", "mark", "enable_thinking", "unit"}
    assert template.variables > {"messages", "tools", "documents", "add_generation_prompt", "bos_token"}
    assert chat_template(CHATML).options == frozenset()
    assert chat_template(LLAMA3).options == {"date_string"}
