"""The inputs that fuzzing begins with: small, and valid or nearly so. Ordinary tests run each of them once."""

import json
import lzma
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tests.support.gguf_files import write_gguf
from tests.support.lora_files import small_adapter, write_folder
from tests.support.paths import ROOT
from tests.support.tiny_tokenizer_model import CHAT_TEMPLATE, write_tiny_model
from tests.support.tool_templates import SMALL
from tests.support.trained_tokenizers import sentencepiece_model, tekken

MESSAGES = [{"role": "user", "content": "Hi"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "string", "pattern": "^x+$"}},
    "required": ["a"],
}
FUNCTION = {"name": "f", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES}

# The index of an endpoint in `targets.PATHS`, and a body for it.
REQUESTS: list[tuple[int, dict[str, Any]]] = [
    (0, {"prompt": "Hi", "max_tokens": 3, "n": 2, "stop": ["a"], "logprobs": 1, "echo": True, "seed": 1}),
    (0, {"prompt": [[1, 2], [3]], "logit_bias": {"1": 5}, "stream": True, "stream_options": {"include_usage": True}}),
    (0, {"prompt": "Hi", "structured_outputs": {"regex": "a[bc]+"}, "dry_multiplier": 0.5, "samplers": ["min_p"]}),
    (0, {"prompt": "Hi", "grammar": 'root ::= "a" | "b"', "truncate_prompt_tokens": 1, "prompt_logprobs": 1}),
    (1, CHAT | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "top_p": 0.5}),
    (1, CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}),
    (1, CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "logprobs": True}),
    (1, CHAT | {"structured_outputs": {"structural_tag": {"format": {"type": "const_string", "value": "a"}}}}),
    (2, {"input": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function", **FUNCTION}], "store": False}),
    (3, {"messages": MESSAGES, "max_tokens": 3, "tools": [{"name": "f", "input_schema": SCHEMA}], "system": "a"}),
    (4, {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 2}),
    (5, {"query": "a", "documents": ["a", {"text": "b"}], "top_n": 1}),
    (6, {"text_1": "a", "text_2": ["a", "b"]}),
    (7, {"messages": MESSAGES, "tools": [TOOL], "chat_template_kwargs": {"a": 1}}),
    (8, {"tokens": [1, 2, 300]}),
    (9, {"messages": MESSAGES, "thinking": {"type": "enabled", "budget_tokens": 1024}}),
    (10, {"input": "Hi", "instructions": "a"}),
    (11, {"messages": MESSAGES, "stream": False, "options": {"top_k": 5, "stop": ["a"]}, "format": SCHEMA}),
    (12, {"prompt": "Hi", "suffix": "", "context": [1, 2], "raw": True}),
    (13, {"input": ["Hi"], "truncate": True}),
    (14, CHAT | {"continue_final_message": True, "add_generation_prompt": False}),
    (15, {"prompt": "Hi", "echo": True, "add_special_tokens": False}),
]

CHUNKS = [
    b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"text":"a","token_ids":[1]}],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n',
    b": ping\r\n\r\nevent: x\nid: 1\n\n",
    b'data: {"error":{"message":"a\\nb","code":null}}\n\ndata: [DONE]\n\n',
]

ANSWERS = [
    '<think>a</think>b<tool_call>{"name": "get_weather", "arguments": {"city": "x", "days": 3}}</tool_call>',
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nx\n</parameter>\n</function>\n</tool_call>",
    '[TOOL_CALLS][{"name": "get_weather", "arguments": {"list": [1, -2]}}]',
    '[get_weather(city="x", options={"name": "a"})]',
    "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{}<|call|>",
    '<|tool_call>call:get_weather{city:<|"|>x<|"|>,days:3}<tool_call|>',
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "<seed:tool_call>\n<function=get_weather>\n<parameter=flag>true</parameter>\n</function>\n</seed:tool_call>",
]

JSON_POST = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
HTTP = [
    b"GET /health HTTP/1.1\r\nhost: localhost\r\n",
    JSON_POST + b'content-length: 15\r\n\r\n{"prompt":"hi"}',
    JSON_POST + b'transfer-encoding: chunked\r\n\r\n5\r\n{"a":\r\n2\r\n1}\r\n0\r\n\r\n',
    b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\nexpect: 100-continue\r\n",
]

TEMPLATES = [
    CHAT_TEMPLATE,
    "{%- macro m(a) %}{{ a | tojson }}{% endmacro %}{% set ns = namespace(x=1) %}{{ m(messages[0]) }}{{ ns.x ** 9 }}",
    "{{ raise_exception('a' * 9) if messages | length > 9 }}{{ messages[::-1] | map(attribute='role') | join }}",
    "{% generation %}{{ (messages | first)['content'].split(' ')[0].strip() }}{% endgeneration %}",
    "{{ '%s' | format(tools) }}{{ strftime_now('%d') }}",
    *(SMALL[name] for name in ("Seed-OSS", "Llama-pythonic")),
]

DIGEST = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
KEYS_FILES = [
    f"a:\n  keys: [sha256:{DIGEST}, {DIGEST[::-1]}]\n  weight: 2\n  admin: true\nb@b: {{keys: {'0' * 64}}}\n",
    f'{{"a": {{"keys": "{DIGEST}", "adapters": ["*"], "tokens-per-day": 9, "negative-priority": false}}}}',
    f"a: &x {{keys: &y {DIGEST}, adapters: sql}}\nb: {{<<: *x, keys: !!str '{DIGEST.upper()}'}}\nc: {{keys: [*y]}}\n",
    *("a: &x [*x]\n", "&x a: *x\n"),
]


def with_number(number: int, data: bytes) -> bytes:
    """Put a first byte before data, with which targets select what the data is for."""
    return bytes([number]) + data


def requests() -> list[bytes]:
    return [with_number(index, json.dumps({"model": "tiny"} | body).encode()) for index, body in REQUESTS]


def streams() -> Iterator[bytes]:
    body = b"".join([*CHUNKS[:3], b"data: [DONE]\n\n"])
    yield b"".join(CHUNKS)
    yield b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + body
    yield b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    yield b'HTTP/1.1 429 Too Many\r\n\r\n{"error":{"message":"full"}}'


def answers() -> Iterator[bytes]:
    for number, text in enumerate(ANSWERS):
        for format in range(number, 24, len(ANSWERS)):
            yield with_number(format, text.encode())


def gguf_files() -> list[bytes]:
    return [lzma.decompress((ROOT / "tests/parity/fixtures/qwen2.gguf.xz").read_bytes())]


def safetensors_files() -> list[bytes]:
    """Return weights of the tiny model, of which only one layer is there."""
    shapes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "mlp.up_proj": (128, 64)}
    tensors = {f"model.layers.0.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    return [safetensors.torch.save(tensors | {"model.norm.weight": torch.ones(64)}, {"format": "pt"})]


def tokenizer_files() -> Iterator[bytes]:
    yield with_number(1, sentencepiece_model(["the quick brown fox"] * 9, byte_fallback=True))
    special = [{"rank": 0, "token_str": "<s>", "is_control": True}]
    yield with_number(2, json.dumps(tekken(special_tokens=special)).encode())
    with tempfile.TemporaryDirectory() as name:
        folder = write_tiny_model(Path(name))
        for number, file in ((0, "tokenizer.json"), (3, "tokenizer_config.json"), (4, "config.json")):
            yield with_number(number, (folder / file).read_bytes())


@cache
def adapter_files() -> Mapping[str, bytes]:
    """Return the files of a small adapter in PEFT's format."""
    with tempfile.TemporaryDirectory() as name:
        return {path.name: path.read_bytes() for path in write_folder(Path(name) / "adapter").iterdir()}


def adapters() -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as name:
        a, b = small_adapter().values()
        tensors = {"blk.1.attn_k.weight.lora_a": a.numpy(), "blk.1.attn_k.weight.lora_b": b.numpy()}
        settings = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
        yield with_number(0, write_gguf(Path(name) / "adapter.gguf", settings, tensors).read_bytes())
    files = adapter_files()
    yield with_number(1, files["adapter_config.json"])
    yield with_number(2, files["adapter_model.safetensors"])
