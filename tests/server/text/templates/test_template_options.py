"""The variables that a chat template reads, and those that a request can set."""

from tests.support.chat_templates import CHATML, LLAMA3, chat_template

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
