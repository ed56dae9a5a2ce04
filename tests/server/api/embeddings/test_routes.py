"""`POST /v1/embeddings` with a fake engine whose embeddings encode the sum of the prompt's token ids."""

import base64
import math
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.shared.messages import Pooling, SamplingParams
from tests.server.conftest import StartServer
from tests.support.clients import openai_client, shared_server
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, wait_until
from tests.support.tiny_tokenizer_model import MAX_MODEL_LEN, VOCAB_SIZE

PATH = "/v1/embeddings"
SIZE = 64


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[RunningServer]:
    with shared_server(model_folder) as server:
        yield server


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


def test_the_official_client(server: RunningServer) -> None:
    """The official client requests base64 by default."""
    with openai_client(server.url, _strict_response_validation=False) as client:
        decoded = client.embeddings.create(model="tiny", input=["Hi", "ho"])
    with openai_client(server.url) as client:
        plain = client.embeddings.create(model="tiny", input=["Hi", "ho"], encoding_format="float")
        assert decoded.usage == plain.usage
        for one, other in zip(decoded.data, plain.data, strict=True):
            assert one.embedding == pytest.approx(other.embedding, rel=1e-7)
            assert len(one.embedding) == SIZE
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model="tiny", input="Hi", dimensions=SIZE + 1)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input", "invalid_value"),
        ({"input": [[1], []]}, "input", "invalid_value"),
        ({"input": [VOCAB_SIZE]}, "input", "invalid_value"),
        ({"input": [-1]}, "input", "invalid_value"),
        ({"input": ["a", 1]}, "input", "invalid_value"),
        ({"input": None}, "input", "invalid_type"),
        ({"input": {}}, "input", "invalid_type"),
        ({"input": [1] * (MAX_MODEL_LEN + 1)}, "input", "context_length_exceeded"),
        ({"input": ["a", "a" * (MAX_MODEL_LEN + 1)]}, "input", "context_length_exceeded"),
        ({"input": "a" * (1 << 20)}, "input", "context_length_exceeded"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"dimensions": 0}, "dimensions", "integer_below_min_value"),
        ({"dimensions": SIZE + 1}, "dimensions", "integer_above_max_value"),
        ({"dimensions": 2.5}, "dimensions", "invalid_type"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(server: RunningServer, fields: dict[str, Any], param: str, code: str) -> None:
    num_submits = len(server.engine.submits)
    error = check_error(ask(server, **({"input": "Hi"} | fields)), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert len(server.engine.submits) == num_submits


def test_other_models_and_unknown_fields(server: RunningServer) -> None:
    check_error(ask(server, "Hi", model="other"), 404)
    error = check_error(httpx.post(server.url + PATH, json={"model": "tiny"}), 400)
    assert (error["param"], error["code"]) == ("input", "missing_required_parameter")
    assert "fancy" in ask(server, "Hi", fancy=1).headers["x-lightwell-warnings"]


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
        others = client.reserve(client.max_in_flight - 1 - 8)  # held by requests that never finish
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


def test_an_engine_that_fails(server: RunningServer) -> None:
    server.engine.config.fail_request = True
    try:
        error = check_error(ask(server, ["a", "b"]), 500)
    finally:
        server.engine.config.fail_request = False
    assert "secret" not in error["message"]
    wait_until(lambda: server.model.client.num_in_flight == 0)


def test_a_client_that_goes_away(server: RunningServer) -> None:
    server.engine.pause()
    try:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + PATH, json={"model": "tiny", "input": ["a", "b"]}, timeout=0.5)
        wait_until(lambda: server.engine.num_choices == server.model.client.num_in_flight == 0)
    finally:
        server.engine.resume()
