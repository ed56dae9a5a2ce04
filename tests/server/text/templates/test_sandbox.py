"""Hostile and broken templates fail, and reach nothing outside the sandbox; which variables a template reads."""

import pytest

from server.text.templates.sandbox import ChatTemplateError
from tests.support.chat_templates import CHATML, chat_template, user
from tests.support.tool_templates import load_template

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


LARGE = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * [1] }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(x=10**30) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endfor %}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
]
FAILING = ["{{ messages[0].content.no.more }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ messages | tojson(indent={}) }}"]
NOT_COMPILED = ["{% if %}", "{{ x", "{% nothing %}", "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}"]
ERRORS = [
    (LARGE, "too large or too deeply nested"),
    (FAILING, "cannot render this request"),
    (NOT_COMPILED, "does not compile"),
]


@pytest.mark.checklist("B10", "C20")
@pytest.mark.parametrize(
    ("source", "message"), [(source, message) for sources, message in ERRORS for source in sources]
)
def test_any_error_is_a_chat_template_error(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message) as error:
        chat_template(source).render(user("canary"))
    assert "canary" not in str(error.value)


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
    llama = load_template("meta-llama-Llama-3.2-3B-Instruct")
    assert llama.options == {"custom_tools", "date_string", "tools_in_user_message"}
