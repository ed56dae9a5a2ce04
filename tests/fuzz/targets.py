"""What is fuzzed: functions that take any bytes and raise only if something is wrong."""

import asyncio
import socket
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from engine.config import load_model_config
from engine.parts.lora.slots import load_lora
from engine.weights import load_weights
from server.cli.chat import _content
from server.cli.parser import CommandError
from server.models.served_model import make_chat_template
from server.parts.bench.bench import Target
from server.parts.bench.commands import LoadOptions
from server.parts.limits.keys_file import read_keys_file
from server.parts.tool_formats.harmony import HarmonyFormat
from server.settings.setting import SettingsError
from server.text.parsers.answer_parser import AnswerFormat
from server.text.templates.chat_template import ChatTemplate
from server.text.templates.sandbox import ChatTemplateError, SandboxedTemplate
from server.text.tokenizer import Tokenizer
from tests.fuzz import seeds
from tests.support.lora_files import CONFIG as ADAPTED_MODEL
from tests.support.parsing import joined_parts
from tests.support.serving import RunningServer, fresh_server, wait_until
from tests.support.tiny_tokenizer_model import write_tiny_model
from tests.support.tool_templates import SCHEMAS, TOOLS, load_template

# Endpoints, of which the first byte of a request selects one.
PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank"),
    *("/v1/score", "/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/responses/input_tokens"),
    *("/api/chat", "/api/generate", "/api/embed", "/v1/chat/completions/render", "/v1/completions/render"),
)
TEMPLATES = (
    *("Qwen-Qwen3-0.6B", "Qwen3-Coder", "llama-cpp-deepseek-r1", "google-gemma-4-31B-it", "MiniMax-M2"),
    *("poolside-Laguna-XS.2", "Seed-OSS", "LFM2.5-8B-A1B"),
    "mistralai-Mistral-Nemo-Instruct-2407",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tokenizer_config.json", "config.json")
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "1"},
]
MAX_HTTP_SECONDS = 60.0  # ends hangs

_resources = ExitStack()  # closed at the end of the process, or by `close`


class FuzzTarget(NamedTuple):
    """A function that is called with any bytes, and the inputs that mutations begin with."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


def close() -> None:
    """Stop the server and remove the files that targets have needed."""
    _resources.close()
    for cached in (_server, _folder, _formats):
        cached.cache_clear()


@cache
def _server() -> RunningServer:
    folder = _folder("server")
    write_tiny_model(folder)
    return _resources.enter_context(fresh_server(folder))


@cache
def _folder(name: str) -> Path:
    return Path(_resources.enter_context(tempfile.TemporaryDirectory(prefix=f"lw-{name}-")))


def request(data: bytes) -> None:
    """Send a body to an endpoint: the answer is none of the server's failures, and errors have the usual form."""
    path = PATHS[data[0] % len(PATHS)] if data else PATHS[0]
    headers = {"content-type": "application/json"}
    response = httpx.post(_server().url + path, content=data[1:], headers=headers, timeout=MAX_HTTP_SECONDS)
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        assert "error" in response.json()
    wait_until(lambda: _server().model.client.num_in_flight == 0)


def http(data: bytes) -> None:
    """Send bytes on a connection: all that comes back are responses, none of them a failure of the server."""
    with _server().connect() as connection, suppress(ConnectionError):
        connection.settimeout(MAX_HTTP_SECONDS)
        connection.sendall(data + b"\r\n\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert answer == b"" or answer.startswith(b"HTTP/1.1 "), answer
        assert b"HTTP/1.1 5" not in answer, answer


def sse(data: bytes) -> None:
    """Read an answer with both clients, which end with the answer or with an error for the user."""
    with suppress(CommandError):
        list(_content(httpx.Response(200, content=data).iter_lines()))
    target = _CannedTarget(data)
    exchange = asyncio.run(target.exchange("Hello", 0.0))
    target.close()
    assert exchange.error is None or "\n" not in exchange.error


class _CannedTarget(Target):
    """A server whose answers are always the same bytes."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(LoadOptions(url="http://localhost"), "tiny")
        self._answer = answer

    def close(self) -> None:
        self._theirs.close()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        ours, self._theirs = socket.socketpair()
        self._theirs.sendall(self._answer)
        self._theirs.shutdown(socket.SHUT_WR)
        return await asyncio.open_connection(sock=ours, limit=1 << 20)


def answer(data: bytes) -> None:
    """Parse an answer of a model: it can be parsed, to the same parts in whatever pieces it arrives."""
    formats = _formats()
    format = formats[data[0] % len(formats)] if data else formats[0]
    text = data[1:].decode("utf-8", "replace")
    whole = joined_parts(format.new_parser(), [text])
    step = 2 + len(data) % 7
    for pieces in (list(text), [text[start : start + step] for start in range(0, len(text), step)]):
        assert joined_parts(format.new_parser(), pieces) == whole


@cache
def _formats() -> list[AnswerFormat]:
    templates = [load_template(name) for name in TEMPLATES]
    formats: list[AnswerFormat] = [HarmonyFormat(tools=SCHEMAS)]
    for template in templates:
        tags, markers = template.reasoning_tags, template.reasoning.content_markers
        formats += [
            AnswerFormat(
                template.tool_format, SCHEMAS, reasoning_tags=tags, content_markers=markers, is_reasoning=is_reasoning
            )
            for is_reasoning in ((False, True) if tags else (False,))
        ]
    return formats


def template(data: bytes) -> None:
    """Compile a chat template and render conversations: any failure is a ChatTemplateError."""
    with suppress(ChatTemplateError):
        renderer = SandboxedTemplate(data.decode("utf-8", "replace"))
        compiled = ChatTemplate(renderer, bos_token="<s>", eos_token="</s>")
        compiled.render(CONVERSATION, tools=TOOLS)
        compiled.render(CONVERSATION[:2], continue_final_message=True)


def gguf(data: bytes) -> None:
    """Read a GGUF file as both processes do."""
    path = _folder("gguf") / "model.gguf"
    path.write_bytes(data)
    _read_model(path)


def safetensors(data: bytes) -> None:
    """Read a model whose weights are these bytes."""
    folder = _folder("safetensors")
    write_tiny_model(folder)
    (folder / "model.safetensors").write_bytes(data)
    _read_model(folder)


def tokenizer(data: bytes) -> None:
    """Read a folder of which one file, selected by the first byte, has these bytes."""
    folder = _folder("tokenizer")
    for old in folder.iterdir():
        old.unlink()
    write_tiny_model(folder)
    name = TOKENIZER_FILES[data[0] % len(TOKENIZER_FILES)] if data else TOKENIZER_FILES[0]
    if name in ("tokenizer.model", "tekken.json"):
        (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(data[1:])
    _read_model(folder)


def _read_model(path: Path) -> None:
    """Read the tokenizer, the configuration and the weights of a model, each of which may be refused."""
    with suppress(ValueError):
        model_tokenizer = Tokenizer.from_model(path)
        model_tokenizer.decode(model_tokenizer.encode("Hello <|im_end|> Ö"))
        if (compiled := make_chat_template(model_tokenizer, None)) is not None:
            compiled.close()
    with suppress(ValueError, OSError):
        config = load_model_config(path)
        for _ in load_weights(path, config, torch.float32):
            pass


def lora(data: bytes) -> None:
    """Read an adapter: a GGUF file, or a folder of which one file has these bytes, as the first byte says."""
    folder, kind, content = _folder("lora"), data[0] % 3 if data else 0, data[1:]
    for name, original in seeds.adapter_files().items():
        (folder / name).write_bytes(original)
    file = ("adapter.gguf", "adapter_config.json", "adapter_model.safetensors")[kind]
    (folder / file).write_bytes(content)
    with suppress(ValueError):
        load_lora(folder / file if kind == 0 else folder, ADAPTED_MODEL)


def keys_file(data: bytes) -> None:
    """Read a keys file: it has keys, or is refused in one line."""
    path = _folder("keys_file") / "keys.yaml"
    path.write_bytes(data)
    try:
        assert read_keys_file(path, has_own_cache=True)
    except SettingsError as error:
        assert len(str(error).splitlines()) == 1, error  # noqa: PT017


TARGETS: Mapping[str, FuzzTarget] = {
    "request": FuzzTarget(request, seeds.requests),
    "http": FuzzTarget(http, lambda: seeds.HTTP),
    "sse": FuzzTarget(sse, seeds.streams),
    "answer": FuzzTarget(answer, seeds.answers),
    "template": FuzzTarget(template, lambda: map(str.encode, seeds.TEMPLATES)),
    "gguf": FuzzTarget(gguf, seeds.gguf_files),
    "safetensors": FuzzTarget(safetensors, seeds.safetensors_files),
    "tokenizer": FuzzTarget(tokenizer, seeds.tokenizer_files),
    "lora": FuzzTarget(lora, seeds.adapters),
    "keys_file": FuzzTarget(keys_file, lambda: map(str.encode, seeds.KEYS_FILES)),
}
