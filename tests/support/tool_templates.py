"""Chat templates that write tool calls: those of the folder `templates`, and minimal ones as models document them."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from server.text.templates.chat_template import ChatTemplate
from server.text.templates.sandbox import SandboxedTemplate

FOLDER = Path(__file__).parent / "templates"
EOS = "<EOS>"

# How a conversation is written around the calls: a system message with the tools, and turns.
_CHAT = """\
{%- if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|assistant|>\\n' }}
{%- if message.reasoning_content %}{{ START + message.reasoning_content + END }}{% endif %}
{{- message.content }}{% if message.tool_calls %}CALLS{% endif %}{{ '<|end|>\\n' }}
{%- else %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
_EACH = "{%- for call in message.tool_calls %}CALL{% endfor %}"
_ARGUMENTS = "{%- for key, value in call.function.arguments.items() %}ARGUMENT{% endfor %}"
_VALUE = "(value if value is string else value | tojson)"
_NAME = "call.function.name"
_JSON = "(call.function.arguments | tojson)"


def _chat(calls: str, start: str = "<think>", end: str = "</think>") -> str:
    return _CHAT.replace("CALLS", calls).replace("START", f"'{start}'").replace("END", f"'{end}'")


def _each(call: str, argument: str = "") -> str:
    return _EACH.replace("CALL", call).replace("ARGUMENTS", _ARGUMENTS.replace("ARGUMENT", argument))


SMALL = {
    # https://huggingface.co/ByteDance-Seed/Seed-OSS-36B-Instruct
    "Seed-OSS": _chat(
        _each(
            f"{{{{ '\\n<seed:tool_call>\\n<function=' + {_NAME} + '>\\n' }}}}ARGUMENTS"
            "{{ '</function>\\n</seed:tool_call>' }}",
            "{{ '<parameter=' + key + '>' + " + _VALUE + " + '</parameter>\\n' }}",
        ),
        "<seed:think>",
        "</seed:think>",
    ),
    # Llama 3.2 and 4 with Python's syntax
    "Llama-pythonic": _chat(
        "{{ '[' }}"
        + _each(
            f"{{{{ {_NAME} + '(' }}}}ARGUMENTS{{{{ ')' }}}}{{{{ '' if loop.last else ', ' }}}}",
            "{{ key + '=' }}{% if value is string %}{{ value | tojson }}{% else %}{{ value | string }}{% endif %}"
            "{{ '' if loop.last else ', ' }}",
        )
        + "{{ ']' }}"
    ),
    # https://huggingface.co/mistralai/Mistral-Small-3.2-24B-Instruct-2506, Magistral
    "Mistral-call-ids": _chat(
        _each(f"{{{{ '[TOOL_CALLS]' + {_NAME} + '[CALL_ID]' + call.id + '[ARGS]' + {_JSON} }}}}"), "[THINK]", "[/THINK]"
    ),
    # https://huggingface.co/microsoft/Phi-4-mini-instruct; the model writes calls, the template does not
    "Phi-4-mini": (
        "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
        "{% if message.role == 'system' and message.tools %}{{ '<|tool|>' + message.tools + '<|/tool|>' }}{% endif %}"
        "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    # Of no model.
    "unknown-json": _chat(
        "{{ '<calls>' }}"
        + _each(f"{{{{ '{{\"tool\": \"' + {_NAME} + '\", \"args\": ' + {_JSON} + '}}\\n' }}}}")
        + "{{ '</calls>' }}",
        "<muse>",
        "</muse>",
    ),
    "unknown-named": _chat(_each(f"{{{{ '<<' + {_NAME} + '>>' + {_JSON} + '<</>>' }}}}")),
    "unknown-tags": _chat(
        _each(
            f"{{{{ '<use tool=\"' + {_NAME} + '\">' }}}}ARGUMENTS{{{{ '</use>' }}}}",
            "{{ '<arg name=\"' + key + '\">' + " + _VALUE + " + '</arg>' }}",
        )
    ),
}


@cache
def load_template(name: str) -> ChatTemplate:
    """Return the template of a file in the folder, or a minimal one."""
    source = SMALL[name] if name in SMALL else (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(SandboxedTemplate(source), bos_token="<BOS>", eos_token=EOS)


NAMES = sorted([*(path.stem for path in FOLDER.glob("*.jinja")), *SMALL])
# Templates that need variables which only their own servers set, or that write no calls.
WITHOUT_CALLS = {
    *("HuggingFaceTB-SmolLM3-3B", "LFM2-8B-A1B", "Phi-4-mini", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B"),
    *("fireworks-ai-llama-3-firefunction-v2", "ibm-granite-granite-3.3-2B-Instruct", "llama-cpp-rwkv-world"),
}
HERMES, LLAMA3 = (load_template(name).tool_format for name in ("Qwen-Qwen3-0.6B", "meta-llama-Llama-3.2-3B-Instruct"))
_OF_MISTRAL = ("mistralai-Mistral-Nemo-Instruct-2407", "unsloth-mistral-Devstral-Small-2507")
MISTRAL, MISTRAL_NAMES = (load_template(name).tool_format for name in _OF_MISTRAL)
WITH_CALLS = [name for name in NAMES if name not in WITHOUT_CALLS]
# One template of each kind of arguments: as JSON, between tags and as literals. The details of all the others are
# for `make test-long`.
KINDS = (*("Qwen-Qwen3-0.6B", "Cohere2MoE", "Qwen3-Coder", "poolside-Laguna-XS.2"), "google-gemma-4-31B-it")


def kinds_first(names: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test with the templates of these names, in `make test` with those of `KINDS` only."""
    params = [name if name in KINDS else pytest.param(name, marks=pytest.mark.long) for name in names]
    return pytest.mark.parametrize("name", params)


POSITION = {"type": "object", "properties": {"x": {"type": "integer"}, "name": {"type": "string"}}, "required": ["x"]}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "x"},
        "days": {"type": "integer", "description": "x"},
        "flag": {"type": "boolean", "description": "x"},
        "list": {"type": "array", "items": {"type": "integer"}, "description": "x"},
        "options": POSITION | {"description": "x", "additionalProperties": {"type": "string"}},
        "ratio": {"type": "number", "description": "x"},
    },
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "x", "parameters": PARAMETERS}}
    for name in ("get_weather", "other-tool")
]
SCHEMAS = {"get_weather": PARAMETERS, "other-tool": PARAMETERS}
