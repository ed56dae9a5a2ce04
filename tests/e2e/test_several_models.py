"""One server of several models, each with its own engine process."""

from pathlib import Path
from typing import Any

import psutil
import yaml
from openai import OpenAI

from tests.support.server_process import ServerProcess, shared_server
from tests.support.serving import check_error, wait_until

LOAD_SECONDS = 180.0  # bounds hangs only


def engines(server: ServerProcess) -> set[int]:
    """Return the process ids of the engines."""
    return {each.pid for each in server.children("engine.process")}


def states(server: ServerProcess) -> dict[str, str]:
    return {model["id"]: model["state"] for model in server.get("/v1/models").json()["data"]}


def test_models_are_loaded_on_first_use_and_unloaded(smollm2_path: Path, tmp_path: Path) -> None:
    """One that cannot be loaded fails its own requests. The engine of each is started again."""
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    small: dict[str, Any] = {"model": str(smollm2_path), "max-model-len": 1024, "kv-cache-memory": "64MiB"}
    models = [
        small | {"served-model-name": ["first", "gpt-4o"]},
        small | {"served-model-name": "second", "load": "on-first-use"},
        {"model": str(tmp_path / "broken.gguf"), "served-model-name": "broken", "load": "on-first-use"},
    ]
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    with shared_server(None, f"--config={tmp_path}/models.yaml") as server:
        assert f"first (loaded), second (unloaded), broken (unloaded), listening on {server.url}" in server.log
        (first_engine,) = engines(server)
        fields = {"temperature": 0, "max_tokens": 16, "seed": 1}
        text = server.complete(model="first", **fields).json()["choices"][0]["text"]
        assert server.complete(model="second", **fields).json()["choices"][0]["text"] == text  # of the same weights
        assert (states(server)["second"], len(engines(server))) == ("loaded", 2)
        answer = server.http.post("/api/generate", json={"model": "second", "keep_alive": 0})
        assert answer.json()["done_reason"] == "unload"
        wait_until(lambda: engines(server) == {first_engine}, LOAD_SECONDS)
        assert states(server)["second"] == "unloaded"
        with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            messages: Any = [{"role": "user", "content": "Hello!"}]
            stream = client.chat.completions.create(model="second", messages=messages, max_tokens=8, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

        error = check_error(server.complete(model="broken"), 503)
        assert error["code"] == "model_load_failed"
        broken = server.get("/v1/models/broken").json()
        assert broken["state"] == "failed"
        assert broken["reason"] in error["message"]
        message = check_error(server.complete(model="third"), 404)["message"]
        assert message.endswith("Available models: `first`, `gpt-4o`, `second`, `broken`.")

        psutil.Process(first_engine).kill()
        wait_until(lambda: first_engine not in engines(server) and len(engines(server)) == 2, LOAD_SECONDS)
        assert server.complete(model="gpt-4o", max_tokens=2).status_code == 200
        assert server.get("/health").json()["restarts"] == 1
        assert server.metric("lightwell_request_success_total", model_name="first") == 2
