"""A second real model: Gemma 3 270M. It is the pretrained model, which continues texts and has no chat template."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server_process import CHAT, COMPLETIONS, ServerProcess, shared_server

CAPITALS = {"Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo"}
CAPITALS |= {"Norway": "Oslo", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw", "Russia": "Moscow"}
TEMPLATE = "{{ bos_token }}{% for message in messages %}Question: {{ message.content }}\nAnswer:{% endfor %}"
BODY = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def gemma(gemma3_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    template = tmp_path_factory.mktemp("gemma") / "template.jinja"
    template.write_text(TEMPLATE)
    flags = ("--max-model-len=2048", "--kv-cache-memory=128MiB", f"--chat-template={template}")
    with shared_server(gemma3_path, *flags) as server:
        yield server


def question(country: str) -> str:
    return f"Question: What is the capital of {country}?\nAnswer:"


# The expected texts are how greedy answers of transformers begin, with the file's weights in float32.


def test_completion(gemma: ServerProcess) -> None:
    answer = gemma.answer(COMPLETIONS, {"prompt": question("France"), "temperature": 0, "max_tokens": 8})
    assert answer["choices"][0]["text"].startswith(" Paris\nQuestion:")
    assert answer["usage"]["prompt_tokens"] == 13  # with BOS


def test_a_prompt_longer_than_the_window(gemma: ServerProcess) -> None:
    """Windowed layers see 512 tokens."""
    examples = "".join(f"{question(country)} {capital}\n" for country, capital in CAPITALS.items())
    body = {"prompt": examples * 5 + question("France"), "temperature": 0, "max_tokens": 8}
    answer = gemma.answer(COMPLETIONS, body)
    assert answer["choices"][0]["text"].startswith(" Paris\nQuestion:")
    assert answer["usage"]["prompt_tokens"] == 713


def test_chat(gemma: ServerProcess) -> None:
    answer = gemma.answer(CHAT, BODY | {"stop": ["\n"]})
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_a_stream_is_the_whole_answer(gemma: ServerProcess) -> None:
    whole = gemma.answer(CHAT, BODY)["choices"][0]["message"]["content"]
    streamed = ""
    for line in gemma.ask(CHAT, BODY | {"stream": True}).text.splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            streamed += choice["delta"].get("content") or ""
    assert streamed == whole != ""


def test_without_a_chat_template(gemma3_path: Path) -> None:
    with shared_server(gemma3_path, "--max-model-len=512", "--kv-cache-memory=64MiB") as server:
        response = server.ask(CHAT, BODY)
    assert (response.status_code, response.json()["error"]["message"]) == (
        400,
        "This model has no chat template; use /v1/completions.",
    )
