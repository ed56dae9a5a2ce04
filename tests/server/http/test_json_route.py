"""Content types and bodies of JSON routes, over real sockets."""

import httpx
import pytest

from tests.support.serving import (
    RunningServer,
    check_error,
)

JSON_BODY = b'{"prompt":"hi"}'


@pytest.mark.checklist("A12")
@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "application/json; charset=latin-1",
        "application/json; charset=utf-16",
    ],
)
def test_other_types_are_415(server: RunningServer, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    check_error(httpx.post(server.url + "/tokenize", content=JSON_BODY, headers=headers), 415)


def test_where_no_route_is_the_type_does_not_matter(server: RunningServer) -> None:
    check_error(httpx.post(server.url + "/nope", content=b"x"), 404)
    check_error(httpx.post(server.url + "/v1/models"), 405)


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON ; charset=UTF-8", 'application/json;charset="utf-8"']
)
def test_json_is_taken(server: RunningServer, content_type: str) -> None:
    response = httpx.post(server.url + "/tokenize", content=JSON_BODY, headers={"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.checklist("A01", "A02")
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt":NaN}', b"\xff"])
def test_bodies_that_are_no_json_object_are_400(server: RunningServer, body: bytes) -> None:
    response = httpx.post(server.url + "/tokenize", content=body, headers={"content-type": "application/json"})
    error = check_error(response, 400)
    assert (error["code"], error["param"]) == (None, None)
    assert error["message"].startswith("We could not parse the JSON body of your request.")


@pytest.mark.checklist("A04")
def test_a_surrogate_is_named_over_http(server: RunningServer) -> None:
    response = httpx.post(
        server.url + "/tokenize", content=b'{"prompt":"\\ud800"}', headers={"content-type": "application/json"}
    )
    assert check_error(response, 400)["param"] == "prompt"
