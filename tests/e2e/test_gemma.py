"""A second real model: Gemma 3 270M. It is the pretrained model, which continues texts and has no chat template."""

from pathlib import Path

import pytest

from tests.support.server_process import CHAT, COMPLETIONS, running_server

CAPITALS = {"Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo"}
CAPITALS |= {"Norway": "Oslo", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw", "Russia": "Moscow"}
TEMPLATE = "{{ bos_token }}{% for message in messages %}Question: {{ message.content }}\nAnswer:{% endfor %}"


def question(country: str) -> str:
    return f"Question: What is the capital of {country}?\nAnswer:"


@pytest.mark.long
def test_answers(gemma3_path: Path, tmp_path: Path) -> None:
    """How greedy answers of transformers begin, with the file's weights in float32. Windowed layers see 512 tokens."""
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    flags = ("--max-model-len=2048", "--kv-cache-memory=128MiB", f"--chat-template={tmp_path / 'template.jinja'}")
    examples = "".join(f"{question(country)} {capital}\n" for country, capital in CAPITALS.items())
    with running_server(gemma3_path, *flags) as gemma:
        for prompt, num_tokens in ((question("France"), 13), (examples * 5 + question("France"), 713)):  # with BOS
            answer = gemma.answer(COMPLETIONS, {"prompt": prompt, "temperature": 0, "max_tokens": 8})
            assert answer["choices"][0]["text"].startswith(" Paris\nQuestion:")
            assert answer["usage"]["prompt_tokens"] == num_tokens
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        answer = gemma.answer(CHAT, {"messages": messages, "temperature": 0, "max_tokens": 16, "stop": ["\n"]})
        assert "Paris" in answer["choices"][0]["message"]["content"]
