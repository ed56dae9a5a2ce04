"""What belongs to a tenant, of what parts keep: responses, recordings, adapters."""

import hashlib
from pathlib import Path
from typing import Any

from tests.server.conftest import StartServer
from tests.server.test_tenants import KEYS, REQUEST, send, submit
from tests.support.clients import write_adapter
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer


def make_response(server: RunningServer, key: str | None = "key-a") -> dict[str, Any]:
    body = {"model": "tiny", "input": "a", "max_output_tokens": 2}
    response: dict[str, Any] = send(server, key, "POST", "/v1/responses", json=body).json()
    return response


def uses_of(response_id: str, item_id: str) -> list[tuple[str, str, dict[str, Any] | None]]:
    """Return requests that find something by an id: method, path and body."""
    body = {"model": "tiny", "input": "b", "max_output_tokens": 1}
    return [
        ("GET", f"/v1/responses/{response_id}", None),
        ("GET", f"/v1/responses/{response_id}?stream=true", None),
        ("GET", f"/v1/responses/{response_id}/input_items", None),
        ("POST", f"/v1/responses/{response_id}/cancel", None),
        ("POST", "/v1/responses", body | {"previous_response_id": response_id}),
        ("POST", "/v1/responses/input_tokens", {"model": "tiny", "input": "b", "previous_response_id": response_id}),
        ("POST", "/v1/responses", body | {"input": [{"type": "item_reference", "id": item_id}]}),
        ("POST", f"/v1/requests/{response_id}/replay", None),
        ("POST", f"/v1/requests/{response_id}/cancel", None),
        ("DELETE", f"/v1/responses/{response_id}", None),
    ]


def test_an_id_of_another_tenant_is_an_unknown_id(keyed: RunningServer) -> None:
    response = make_response(keyed)
    real_ids = (response["id"], response["output"][0]["id"])
    unknown_ids = tuple(f"{id.partition('_')[0]}_{'0' * 32}" for id in real_ids)
    for real, unknown in zip(uses_of(*real_ids), uses_of(*unknown_ids), strict=True):
        answers = [send(keyed, "key-b", method, path, json=body) for method, path, body in (real, unknown)]
        assert answers[0].status_code in (400, 404), real
        text = answers[0].text
        for id, other in zip(real_ids, unknown_ids, strict=True):
            text = text.replace(id, other)
        assert (answers[0].status_code, text) == (answers[1].status_code, answers[1].text), real
        assert dict(answers[0].headers) | {"date": ""} == dict(answers[1].headers) | {"date": ""}, real
    for method, path, body in uses_of(*real_ids):
        refused = path.endswith("/cancel") or "stream" in path  # it has ended, and was not created in the background
        assert (send(keyed, "key-a", method, path, json=body).status_code == 200) is not refused, path


def test_a_chosen_id_names_a_request_of_each_tenant(keyed: RunningServer) -> None:
    for key, prompt in zip(KEYS, ("a", "abc"), strict=True):
        assert send(keyed, key, "POST", "/v1/completions", json=REQUEST | {"prompt": prompt}).status_code == 200
    for key, num_tokens in zip(KEYS, (1, 3), strict=True):
        assert send(keyed, key, "POST", "/v1/requests/mine/replay").json()["bit_equal"] is True
        assert len(keyed.engine.submits[-1].prompt_token_ids) == num_tokens
        assert keyed.engine.submits[-1].tenant == f"key-{1 + KEYS.index(key)}"


def test_an_item_of_another_tenant_is_not_found_by_copying_its_id(keyed: RunningServer) -> None:
    item = make_response(keyed)["output"][0]["id"]
    body = {"model": "tiny", "max_output_tokens": 1}
    forged = [{"type": "message", "role": "user", "content": "forged", "id": item}]
    assert send(keyed, "key-b", "POST", "/v1/responses", json=body | {"input": forged}).status_code == 200
    prompts = []
    for key in KEYS:
        reference = body | {"input": [{"type": "item_reference", "id": item}]}
        assert send(keyed, key, "POST", "/v1/responses", json=reference).status_code == 200
        prompts.append(bytes(id for id in keyed.engine.submits[-1].prompt_token_ids if id < 256))
    assert [b"forged" in prompt for prompt in prompts] == [False, True]


def test_a_rotation_a_single_key_and_no_key_are_one_owner(start_server: StartServer, server: RunningServer) -> None:
    rotated, single = start_server(api_key=KEYS, one_tenant=True), start_server(api_key=KEYS[:1])
    for each, keys in ((rotated, KEYS), (single, KEYS[:1] * 2), (server, (None, None))):
        response = make_response(each, keys[0])
        assert send(each, keys[1], "GET", f"/v1/responses/{response['id']}").json() == response
        salts = [submit(each, key, cache_salt="s").cache_salt for key in keys]
        assert salts[0] == salts[1]


def test_embeddings_have_caches_of_their_own(keyed: RunningServer) -> None:
    body = {"model": "tiny", "input": "a"}
    salts = []
    for key in KEYS:
        assert send(keyed, key, "POST", "/v1/embeddings", json=body).status_code == 200
        salts.append(keyed.engine.submits[-1].cache_salt)
    assert salts[0] != salts[1]


# LoRA adapters.


def test_an_adapter_exists_only_for_those_who_may_use_it(
    start_server: StartServer, fake_engine: FakeEngine, tmp_path: Path
) -> None:
    fake_engine.config.max_loras = 1
    file = tmp_path / "keys.yaml"
    grants = {"alice": "adapters: [sql]", "bob": "weight: 1", "carol": "adapters: '*'", "root": "admin: true"}
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in grants}
    file.write_text("".join(f"{name}: {{keys: {digests[name]}, {grants[name]}}}\n" for name in grants))
    server = start_server(api_keys_file=str(file), allow_runtime_lora_updating=True)
    loaded = {"lora_name": "sql", "lora_path": str(write_adapter(tmp_path / "adapter"))}
    assert send(server, "root", "POST", "/v1/load_lora_adapter", json=loaded).status_code == 200
    for name in grants:
        expected = ["tiny", "org/tiny"] + (["sql"] if name != "bob" else [])
        models = send(server, name, "GET", "/v1/models").json()["data"]
        assert [model["id"] for model in models] == expected
        assert ("/" in models[-1]["root"]) is (name == "root")
        tags = send(server, name, "GET", "/api/tags").json()["models"]
        assert any(model["name"].startswith("sql") for model in tags) is (name != "bob")
        status = send(server, name, "POST", "/v1/completions", json=REQUEST | {"model": "sql"}).status_code
        assert status == (404 if name == "bob" else 200)
    for path, field in (("/v1/completions", "prompt"), ("/v1/embeddings", "input"), ("/api/generate", "prompt")):
        bodies = [{"model": model, field: "a"} for model in ("SQL", "NONE")]
        real, unknown = (send(server, "bob", "POST", path, json=body).text for body in bodies)
        assert real.replace("SQL", "NONE") == unknown, path
    unnamed = {name: value for name, value in REQUEST.items() if name != "model"}
    answers = [send(server, name, "POST", "/v1/completions", json=unnamed) for name in ("alice", "bob")]
    assert [answer.status_code for answer in answers] == [400, 200]
