"""The formats of tool calls that are detected from chat templates."""

import pytest

from server.text.parsers.tool_formats import (
    GENERIC,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_NAMES,
    ToolFormat,
    detect_tool_format,
)


@pytest.mark.parametrize(
    ("source", "format"),
    [
        ('{{ \'<tool_call>\\n{"name": "\' + call.name }}', HERMES),
        ("{{ '[TOOL_CALLS] [' }}{{ '<tool_call>' }}", MISTRAL),
        ("{{ '[TOOL_CALLS]' + call.name + '[ARGS]' }}", MISTRAL_NAMES),
        ("{% if call.name in builtin_tools %}{{ '<|python_tag|>' }}{% endif %}", LLAMA3),
        ("""{{ 'Respond in the format {"name": function name, "parameters": dictionary of argument name' }}""", LLAMA3),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", GENERIC),
    ],
)
def test_formats_of_templates(source: str, format: ToolFormat) -> None:
    assert detect_tool_format(source) is format
