"""Tests of LoRA adapters on a real server: selected by `model`, mixed in batches, loaded and unloaded at runtime."""

import concurrent.futures
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from engine.config import load_model_config
from tests.e2e.conftest import StartServer
from tests.support.lora_adapters import save_random_adapter
from tests.support.server_process import MODEL, REQUEST_SECONDS, ServerProcess

PROMPTS = ["The capital of France is", "Once upon a time", "def add(a, b):"]


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, folder = load_model_config(smollm2_path), tmp_path_factory.mktemp("adapters")
    save_random_adapter(folder / "poet", config, 1, ranks={"": 16})
    save_random_adapter(folder / "coder", config, 2, ranks={"": 4}, strength=1.0)
    save_random_adapter(folder / "high", config, 3, ranks={"": 17})
    return folder


@pytest.fixture
def server(start_server: StartServer, folder: Path) -> ServerProcess:
    flags = ("--max-loras=2", "--allow-runtime-lora-updating", "--record-requests=20")
    return start_server(f"--lora-modules=poet={folder / 'poet'}", *flags)


def openai_client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS)


def answer(client: OpenAI, model: str, prompt: str, **more: Any) -> tuple[str, str | None]:
    """Return the text and the system fingerprint of a completion."""
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}} | more
    completion = client.completions.create(model=model, prompt=prompt, **settings)
    assert completion.model == model
    return completion.choices[0].text, completion.system_fingerprint


def load(server: ServerProcess, name: str, path: Path, **more: Any) -> httpx.Response:
    return server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def unload(server: ServerProcess, name: str) -> httpx.Response:
    return server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_adapters_from_first_to_last(server: ServerProcess, folder: Path) -> None:
    client = openai_client(server)
    assert [model.id for model in client.models.list()] == [MODEL, "poet"]
    assert load(server, "coder", folder / "coder").text == "Success: LoRA adapter 'coder' added successfully."
    models = [MODEL, "poet", "coder"]
    assert [model.id for model in client.models.list()] == models

    alone = {(model, prompt): answer(client, model, prompt) for prompt in PROMPTS for model in models}
    texts = {model: [alone[model, prompt][0] for prompt in PROMPTS] for model in models}
    assert texts[MODEL] != texts["poet"] != texts["coder"] != texts[MODEL]
    assert len({fingerprint for _, fingerprint in alone.values()}) == len(models)
    with concurrent.futures.ThreadPoolExecutor(18) as pool:
        together = list(pool.map(lambda key: (key, answer(client, *key)), [*alone, *alone]))
    assert all(found == alone[key] for key, found in together)

    problems = {
        load(server, "third", folder / "poet"): "2 adapters are loaded, as many as --max-loras allows",
        load(server, "coder", folder / "coder"): "'coder' has already been loaded",
        load(server, "coder", folder / "high", load_inplace=True): "rank 17 is more than the 16 of --max-lora-rank",
        load(server, "coder", folder / "absent", load_inplace=True): "absent",
        load(server, MODEL, folder / "coder"): MODEL,
    }
    for response, text in problems.items():
        assert response.status_code == 400
        assert text in response.json()["error"]["message"]
    assert answer(client, "coder", PROMPTS[0]) == alone["coder", PROMPTS[0]]

    recorded = client.completions.create(model="coder", prompt="Hello", max_tokens=8, temperature=1.0)
    replayed = server.http.post(f"/v1/requests/{recorded.id}/replay").json()
    assert replayed["bit_equal"], replayed
    assert unload(server, "coder").text == "Success: LoRA adapter 'coder' removed successfully."
    assert unload(server, "coder").status_code == 404
    with pytest.raises(openai.NotFoundError, match="coder"):
        answer(client, "coder", PROMPTS[0])
    assert server.http.post(f"/v1/requests/{recorded.id}/replay").status_code in (400, 404)
    assert answer(client, MODEL, PROMPTS[0]) == alone[MODEL, PROMPTS[0]]
    assert answer(client, "poet", PROMPTS[0]) == alone["poet", PROMPTS[0]]


def test_a_stream_keeps_its_adapter(server: ServerProcess, folder: Path) -> None:
    client = openai_client(server)
    expected, _ = answer(client, "poet", PROMPTS[1], max_tokens=200)
    pieces: list[str] = []
    for event in client.completions.create(
        model="poet", prompt=PROMPTS[1], max_tokens=200, temperature=0, stream=True, extra_body={"ignore_eos": True}
    ):
        if not pieces:
            assert load(server, "poet", folder / "coder", load_inplace=True).status_code == 200
            metrics = server.http.get("/metrics").text
            assert re.search(r'lora_requests_info\{[^}]*running_lora_adapters="poet"', metrics)
        pieces += [choice.text for choice in event.choices]
    assert "".join(pieces) == expected
    assert answer(client, "poet", PROMPTS[1], max_tokens=200)[0] != expected


def test_chat_and_embeddings(server: ServerProcess) -> None:
    client = openai_client(server)
    messages: Any = [{"role": "user", "content": "Hi!"}]
    texts, vectors = [], []
    for model in (MODEL, "poet"):
        chat = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0)
        assert chat.model == model
        texts.append(chat.choices[0].message.content)
        vectors.append(client.embeddings.create(model=model, input="Hi!").data[0].embedding)
    assert texts[0] != texts[1]
    assert vectors[0] != vectors[1]


def test_adapters_that_cannot_be_loaded_fail_the_start(start_server: StartServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true, "r": 4, "lora_alpha": 4}')
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "coder" / "adapter_model.safetensors").read_bytes())
    for path, text in ((tmp_path, "use_dora"), (folder / "absent", "absent")):
        with pytest.raises(AssertionError, match=text):
            start_server(f"--lora-modules=broken={path}")
