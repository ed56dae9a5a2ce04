"""Errors of the framework and of pydantic, over real sockets."""

import httpx

from tests.support.serving import RunningServer, check_error


def test_unknown_routes_and_methods(shared_server: RunningServer) -> None:
    error = check_error(httpx.post(shared_server.url + "/v1/foo?key=secret", json={}), 404)
    assert error["message"] == "Invalid URL (POST /v1/foo)"
    assert error["code"] is None
    response = httpx.get(shared_server.url + "/v1/completions")
    check_error(response, 405)
    assert response.headers["allow"] == "POST"
    assert httpx.head(shared_server.url + "/v1/models").status_code == 405
    check_error(httpx.delete(shared_server.url + "/v1/models/tiny"), 405)
    check_error(httpx.get(shared_server.url + "/v1/models/"), 404)
    check_error(httpx.get(shared_server.url + "/" + "x" * 5000), 404)


def test_validation_errors_are_400_with_a_path(shared_server: RunningServer) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": 5}]}
    error = check_error(httpx.post(shared_server.url + "/v1/chat/completions", json=body), 400)
    assert error["param"] == "messages[0].content"
    assert error["code"] == "invalid_type"
    error = check_error(httpx.post(shared_server.url + "/v1/completions", json={"prompt": "x"}), 400)
    assert error["message"] == "you must provide a model parameter"
