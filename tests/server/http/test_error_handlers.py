"""Errors of the framework and of pydantic, over real sockets."""

import httpx
import pytest

from tests.support.serving import RunningServer, check_error


@pytest.mark.checklist("A13")
def test_unknown_routes_and_methods(server: RunningServer) -> None:
    error = check_error(httpx.post(server.url + "/v1/foo?key=secret", json={}), 404)
    assert error["message"] == "Invalid URL (POST /v1/foo)"
    assert error["code"] is None
    response = httpx.get(server.url + "/v1/completions")
    check_error(response, 405)
    assert response.headers["allow"] == "POST"
    assert "(HINT: Use POST.)" in check_error(response, 405)["message"]
    response = httpx.put(server.url + "/v1/responses/resp_1")  # one route for each method
    assert "(HINT: Use GET or DELETE.)" in check_error(response, 405)["message"]
    assert response.headers["allow"] == "GET, DELETE"
    assert httpx.head(server.url + "/v1/models").status_code == 405
    check_error(httpx.delete(server.url + "/v1/models/tiny"), 405)
    error = check_error(httpx.get(server.url + "/v1/models/"), 404)
    assert error["message"] == "Invalid URL (GET /v1/models/). (HINT: Did you mean /v1/models?)"
    check_error(httpx.get(server.url + "/" + "x" * 5000), 404)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/openai/v1/embeddings", "/v1/embeddings"),
        ("//v1/completions", "/v1/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/api/tags", "/api/tags"),
        ("/v1/api/chat", "/api/chat"),
        ("/v2/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/chatcompletions", "/v1/chat/completions"),
        ("/completion", "/v1/completions"),
        ("/v1", "/v1/models"),
        ("/v1/", "/v1/models"),
        ("/api", "/api/tags"),
        ("/v1/foo", None),
        ("/v1/realtime", None),
        ("/x", None),
    ],
)
def test_a_wrong_base_url_or_path_is_recognised(server: RunningServer, path: str, meant: str | None) -> None:
    """A suggested path exists: it gets another answer than 404."""
    error = check_error(httpx.post(server.url + path, json={}), 404)
    hint = f". (HINT: Did you mean {meant}?)" if meant else ""
    assert error["message"] == f"Invalid URL (POST {path}){hint}"
    if meant:
        assert httpx.post(server.url + meant, json={}).status_code in (400, 405)
