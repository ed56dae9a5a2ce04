"""LoRA adapters on a real server: selected by `model`, mixed in batches, loaded and unloaded at runtime."""

import concurrent.futures
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.config import load_model_config
from tests.e2e.conftest import StartServer
from tests.support.lora_adapters import save_random_adapter
from tests.support.server_process import CHAT, COMPLETIONS, MODEL, ServerProcess
from tests.support.serving import check_error
from tests.support.streams import Stream, merge

pytestmark = pytest.mark.long

PROMPTS = ["The capital of France is", "Once upon a time", "def add(a, b):"]


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, folder = load_model_config(smollm2_path), tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate({"poet": 16, "coder": 4, "high": 17}.items(), start=1):
        save_random_adapter(folder / name, config, seed, ranks={"": rank}, strength=1.0)
    return folder


def load(server: ServerProcess, name: str, path: Path, **more: Any) -> httpx.Response:
    return server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def test_adapters_from_first_to_last(start_server: StartServer, folder: Path) -> None:
    flags = ("--max-loras=2", "--allow-runtime-lora-updating", "--record-requests=20")
    server = start_server(f"--lora-modules=poet={folder / 'poet'}", *flags)
    assert load(server, "coder", folder / "coder").text == "Success: LoRA adapter 'coder' added successfully."
    models = [MODEL, "poet", "coder"]
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == models

    def answer(model: str, prompt: str) -> tuple[str, str]:
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 24, "ignore_eos": True}
        found = server.answer(COMPLETIONS, body)
        assert found["model"] == model
        return found["choices"][0]["text"], found["system_fingerprint"]

    alone = {(model, prompt): answer(model, prompt) for prompt in PROMPTS for model in models}
    texts = {model: [alone[model, prompt][0] for prompt in PROMPTS] for model in models}
    assert texts[MODEL] != texts["poet"] != texts["coder"] != texts[MODEL]
    assert len({fingerprint for _, fingerprint in alone.values()}) == len(models)
    with concurrent.futures.ThreadPoolExecutor(18) as pool:
        together = list(pool.map(lambda key: (key, answer(*key)), [*alone, *alone]))
    assert all(found == alone[key] for key, found in together)

    for response, text in (
        (load(server, "third", folder / "poet"), "2 adapters are loaded, as many as --max-loras allows"),
        (load(server, "coder", folder / "coder"), "'coder' has already been loaded"),
        (load(server, "coder", folder / "high", load_inplace=True), "rank 17 is more than the 16 of --max-lora-rank"),
        (load(server, "coder", folder / "absent", load_inplace=True), "absent"),
        (load(server, MODEL, folder / "coder"), MODEL),
    ):
        assert text in check_error(response, 400)["message"]
    assert answer("coder", PROMPTS[0]) == alone["coder", PROMPTS[0]]

    bodies = [{"model": model, "messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 16} for model in models]
    chats = [server.answer(CHAT, body)["choices"][0]["message"]["content"] for body in bodies]
    vectors = [server.answer("/v1/embeddings", {"model": model, "input": "Hi!"})["data"] for model in models]
    assert len(set(chats)) == 3
    assert vectors[0] != vectors[1] != vectors[2]

    recorded = server.answer(COMPLETIONS, {"model": "coder", "prompt": "Hello", "max_tokens": 8})["id"]
    replayed = server.http.post(f"/v1/requests/{recorded}/replay").json()
    assert replayed["bit_equal"], replayed
    unload = {"lora_name": "coder"}
    assert server.http.post("/v1/unload_lora_adapter", json=unload).status_code == 200
    assert server.http.post("/v1/unload_lora_adapter", json=unload).status_code == 404
    check_error(server.complete(model="coder"), 404)
    assert server.http.post(f"/v1/requests/{recorded}/replay").status_code in (400, 404)
    assert answer("poet", PROMPTS[0]) == alone["poet", PROMPTS[0]]

    # A stream keeps the adapter that it began with.
    body = {"model": "poet", "prompt": PROMPTS[1], "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    expected = merge([server.answer(COMPLETIONS, body)])
    stream = Stream(server, body)
    stream.wait_for_start()
    assert load(server, "poet", folder / "coder", load_inplace=True).status_code == 200
    assert server.metric("lightwell_lora_requests_info", running_lora_adapters="poet") > 0
    assert merge(stream.result().chunks) == expected
    assert merge([server.answer(COMPLETIONS, body)]) != expected


def test_adapters_that_cannot_be_loaded_fail_the_start(start_server: StartServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true, "r": 4, "lora_alpha": 4}')
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "coder" / "adapter_model.safetensors").read_bytes())
    for path, text in ((tmp_path, "use_dora"), (folder / "absent", "absent")):
        with pytest.raises(AssertionError, match=text):
            start_server(f"--lora-modules=broken={path}")
