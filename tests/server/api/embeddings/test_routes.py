"""`POST /v1/embeddings` with a fake engine whose embeddings encode the sum of the prompt's token ids."""

import base64
import json
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from engine.shared.messages import Pooling, SamplingParams
from tests.server.conftest import StartServer
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, raw_request, wait_until
from tests.support.tiny_tokenizer_model import MAX_MODEL_LEN

PATH = "/v1/embeddings"
SIZE = 64


def ask(server: RunningServer, input: object, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + PATH, json={"model": "tiny", "input": input} | fields)


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [(item["object"], item["index"]) for item in data] == [("embedding", index) for index in range(len(data))]
    return [item["embedding"] for item in data]


def index_of_sum(embedding: list[float]) -> int:
    return embedding.index(0.8) - 1


@pytest.mark.parametrize(
    ("input", "prompts"),
    [
        ("Hi", [[72, 105]]),
        (["a", "bc", "a"], [[97], [98, 99], [97]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[7], [8, 9]], [[7], [8, 9]]),
    ],
)
def test_inputs(server: RunningServer, input: object, prompts: list[list[int]]) -> None:
    answer = ask(server, input, user="somebody")
    assert [index_of_sum(vector) for vector in vectors(answer)] == [sum(prompt) % 63 for prompt in prompts]
    num_tokens = sum(map(len, prompts))
    rest = {name: value for name, value in answer.json().items() if name != "data"}
    assert rest == {
        "object": "list",
        "model": "tiny",
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    submits = server.engine.submits[-len(prompts) :]
    assert [submit.prompt_token_ids for submit in submits] == prompts
    assert {submit.params.pooling for submit in submits} == {Pooling.MEAN}
    assert "x-lightwell-warnings" not in answer.headers


def test_the_setting(start_server: StartServer) -> None:
    server = start_server(pooling="last")
    vectors(ask(server, "Hi"))
    expected = SamplingParams(max_tokens=0, temperature=0.0, pooling=Pooling.LAST)
    assert server.engine.submits[-1].params == expected


def test_base64(server: RunningServer) -> None:
    (text,) = vectors(ask(server, "Hi", encoding_format="base64"))
    data = base64.b64decode(str(text), validate=True)
    (exact,) = vectors(ask(server, "Hi", encoding_format="float"))
    assert list(struct.unpack(f"<{SIZE}f", data)) == pytest.approx(exact, rel=1e-7)


def test_dimensions(server: RunningServer) -> None:
    (whole,) = vectors(ask(server, [10], dimensions=SIZE))
    assert whole == vectors(ask(server, [10]))[0]
    (first,) = vectors(ask(server, [10], dimensions=13))  # the other non-zero number has index 11
    assert first == pytest.approx(whole[:13])
    (fewer,) = vectors(ask(server, [10], dimensions=5))
    assert fewer == [1.0, 0, 0, 0, 0]
    assert math.hypot(*first) == pytest.approx(1)


def test_the_codes_of_errors(server: RunningServer) -> None:
    long, code = "context_length_exceeded", "missing_required_parameter"
    assert check_error(httpx.post(server.url + PATH, json={"model": "tiny"}), 400)["code"] == code
    for input in ([1] * (MAX_MODEL_LEN + 1), ["a", "a" * (MAX_MODEL_LEN + 1)], "a" * (1 << 20)):
        error = check_error(ask(server, input), 400)
        assert (error["param"], error["code"]) == ("input", long)
    for dimensions, code in ((0, "integer_below_min_value"), (SIZE + 1, "integer_above_max_value")):
        assert check_error(ask(server, "Hi", dimensions=dimensions), 400)["code"] == code
    assert server.engine.submits == []


def test_the_longest_input(server: RunningServer) -> None:
    assert len(vectors(ask(server, [1] * MAX_MODEL_LEN))) == 1


def test_more_inputs_than_capacity(start_server: StartServer, fake_engine: FakeEngine) -> None:
    """The inputs run in turns and leave capacity for other requests."""
    server = start_server(max_queued_requests=1)
    texts = [f"{number}" for number in range(2048)]
    answer = ask(server, texts)
    assert [item["index"] for item in answer.json()["data"]] == list(range(2048))
    assert vectors(answer) == [vectors(ask(server, text))[0] for text in texts[:3]] + vectors(answer)[3:]
    assert [bytes(submit.prompt_token_ids).decode() for submit in fake_engine.submits[:2048]] == texts
    assert server.model.client.num_in_flight == 0


def test_little_free_capacity_suffices(start_server: StartServer, fake_engine: FakeEngine) -> None:
    """A single free choice in flight suffices while all others are busy."""
    server = start_server(max_queued_requests=1)
    client = server.model.client
    fake_engine.pause()
    with ThreadPoolExecutor() as threads:
        embeddings = threads.submit(ask, server, [f"{number}" for number in range(30)])
        wait_until(lambda: client.num_in_flight == 8)
        others = server.reserve(client.max_in_flight - 1 - 8)  # held by requests that never finish
        fake_engine.resume()
        assert len(vectors(embeddings.result(timeout=30))) == 30
    others.release()
    assert client.num_in_flight == 0


def test_how_texts_become_tokens(server: RunningServer) -> None:
    def prompts(**fields: Any) -> list[list[int]]:
        answer = ask(server, **({"input": ["Hello", "Hi"]} | fields))
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] == sum(
            len(submit.prompt_token_ids) for submit in server.engine.submits[-2:]
        )
        return [submit.prompt_token_ids for submit in server.engine.submits[-2:]]

    for same in (True, False, None):  # the tokenizer adds no special tokens
        assert prompts(add_special_tokens=same) == [[*b"Hello"], [*b"Hi"]]
    assert prompts(truncate_prompt_tokens=3) == [[*b"llo"], [*b"Hi"]]
    assert prompts(truncate_prompt_tokens=3, truncation_side="right") == [[*b"Hel"], [*b"Hi"]]
    long = "a" * (MAX_MODEL_LEN + 7)
    assert prompts(input=[long, "b"], truncate_prompt_tokens=-1) == [[97] * MAX_MODEL_LEN, [98]]


@pytest.mark.parametrize("path", [PATH, "/v1/rerank"])
def test_failures_and_clients_that_go_away(server: RunningServer, path: str) -> None:
    body = {"model": "tiny"} | ({"input": ["a", "b"]} if path == PATH else {"query": "a", "documents": ["b"]})
    server.engine.config.fail_request = True
    assert "secret" not in check_error(httpx.post(server.url + path, json=body), 500)["message"]
    wait_until(lambda: server.model.client.num_in_flight == 0)
    server.engine.pause()
    with server.connect() as connection:
        connection.sendall(raw_request("POST", path, json.dumps(body).encode(), content_type="application/json"))
        wait_until(lambda: server.engine.num_choices == 2)
    wait_until(lambda: server.engine.num_choices == server.model.client.num_in_flight == 0)
