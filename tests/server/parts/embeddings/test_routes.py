"""Embeddings, reranking and scores, with a fake engine whose embeddings encode the sum of the prompt's token ids."""

import base64
import json
import logging
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from engine.shared.messages import Pooling, SamplingParams
from tests.server.conftest import StartServer
from tests.server.http.test_request_middleware import access_fields
from tests.support import clients
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, raw_request, wait_until
from tests.support.tiny_tokenizer_model import MAX_MODEL_LEN

PATH = "/v1/embeddings"
SIZE = 64


def ask(server: RunningServer, input: object, **fields: Any) -> httpx.Response:
    return clients.ask(server.url, PATH, **{"input": input} | fields)


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [(item["object"], item["index"]) for item in data] == [("embedding", index) for index in range(len(data))]
    return [item["embedding"] for item in data]


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
    assert [vector.index(0.8) - 1 for vector in vectors(answer)] == [sum(prompt) % 63 for prompt in prompts]
    usage = dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(len, prompts)))
    assert answer.json() | {"data": []} == {"object": "list", "model": "tiny", "usage": usage, "data": []}
    submits = server.engine.submits[-len(prompts) :]
    assert [submit.prompt_token_ids for submit in submits] == prompts
    assert {submit.params.pooling for submit in submits} == {Pooling.MEAN}
    assert "x-lightwell-warnings" not in answer.headers


def test_the_setting(start_server: StartServer) -> None:
    server = start_server(pooling="last")
    vectors(ask(server, "Hi"))
    (submit,) = server.engine.submits
    assert submit.params == SamplingParams(max_tokens=0, temperature=0.0, pooling=Pooling.LAST)


def test_base64(server: RunningServer) -> None:
    (text,), (exact,) = (vectors(ask(server, "Hi", encoding_format=kind)) for kind in ("base64", "float"))
    data = base64.b64decode(str(text), validate=True)
    assert list(struct.unpack(f"<{SIZE}f", data)) == pytest.approx(exact, rel=1e-7)


def test_dimensions(server: RunningServer) -> None:
    whole, same, first, fewer = (vectors(ask(server, [10], dimensions=size))[0] for size in (None, SIZE, 13, 5))
    assert whole == same
    assert first == pytest.approx(whole[:13])  # the other non-zero number has index 11
    assert fewer == [1.0, 0, 0, 0, 0]
    assert math.hypot(*first) == pytest.approx(1)


def test_the_codes_of_errors(server: RunningServer) -> None:
    assert check_error(ask(server, ...), 400)["code"] == "missing_required_parameter"
    for input in ([1] * (MAX_MODEL_LEN + 1), ["a", "a" * (MAX_MODEL_LEN + 1)], "a" * (1 << 20)):
        error = check_error(ask(server, input), 400)
        assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    error = check_error(ask(server, "Hi", dimensions=SIZE + 1), 400)
    assert error["code"] == "integer_above_max_value"
    assert server.engine.submits == []
    assert len(vectors(ask(server, [1] * MAX_MODEL_LEN))) == 1


def test_more_inputs_than_capacity(start_server: StartServer, fake_engine: FakeEngine) -> None:
    """The inputs run in turns and leave capacity for other requests."""
    server = start_server(max_queued_requests=1)
    texts = [f"{number}" for number in range(2048)]
    found = vectors(ask(server, texts))
    assert len(found) == 2048
    assert found[:3] == [vectors(ask(server, text))[0] for text in texts[:3]]
    assert [bytes(submit.prompt_token_ids).decode() for submit in fake_engine.submits[:2048]] == texts
    assert server.model.client.num_in_flight == 0


def test_little_free_capacity_suffices(start_server: StartServer, threads: ThreadPoolExecutor) -> None:
    """A single free choice in flight suffices while all others are busy."""
    server = start_server(max_queued_requests=1)
    client = server.model.client
    server.engine.pause()
    embeddings = threads.submit(ask, server, [f"{number}" for number in range(30)])
    wait_until(lambda: client.num_in_flight == 8)
    others = server.reserve(client.max_in_flight - 1 - 8)  # held by requests that never finish
    server.engine.resume()
    assert len(vectors(embeddings.result(timeout=30))) == 30
    others.release()
    assert client.num_in_flight == 0


def test_how_texts_become_tokens(server: RunningServer, fim: RunningServer) -> None:
    def prompts(**fields: Any) -> list[list[int]]:
        answer = ask(server, **{"input": ["Hello", "Hi"]} | fields).json()
        found = [submit.prompt_token_ids for submit in server.engine.submits[-2:]]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, found))
        return found

    for value in (True, False, None):  # a token before each text
        usage = ask(fim, "Hi", add_special_tokens=value).json()["usage"]
        assert usage["prompt_tokens"] == (2 if value is False else 3)
    assert prompts(truncate_prompt_tokens=3) == [[*b"llo"], [*b"Hi"]]
    assert prompts(truncate_prompt_tokens=3, truncation_side="right") == [[*b"Hel"], [*b"Hi"]]
    long = "a" * (MAX_MODEL_LEN + 7)
    assert prompts(input=[long, "b"], truncate_prompt_tokens=-1) == [[97] * MAX_MODEL_LEN, [98]]


@pytest.mark.parametrize("path", [PATH, "/v1/rerank"])
def test_failures_and_clients_that_go_away(server: RunningServer, path: str) -> None:
    fields: dict[str, Any] = {"input": ["a", "b"]} if path == PATH else {"query": "a", "documents": ["b"]}
    server.engine.config.fail_request = True
    assert "secret" not in check_error(clients.ask(server.url, path, **fields), 500)["message"]
    wait_until(lambda: server.model.client.num_in_flight == 0)
    server.engine.pause()
    with server.connect() as connection:
        body = json.dumps({"model": "tiny", **fields}).encode()
        connection.sendall(raw_request("POST", path, body, content_type="application/json"))
        wait_until(lambda: server.engine.num_choices == 2)
    wait_until(lambda: server.engine.num_choices == server.model.client.num_in_flight == 0)


# Reranking and scores, compared with the embeddings of the same server.

DOCUMENTS = ["bc", "a", "b", "ab", "z"]


def rerank(server: RunningServer, path: str = "/v1/rerank", **fields: Any) -> httpx.Response:
    return clients.ask(server.url, path, **{"query": "a", "documents": DOCUMENTS} | fields)


def score(server: RunningServer, **fields: Any) -> httpx.Response:
    return clients.ask(server.url, "/v1/score", **fields)


def similarity(server: RunningServer, first: str, second: str) -> float:
    """Return the cosine similarity of two texts, by the API for embeddings."""
    one, other = vectors(ask(server, [first, second]))
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_rerank_by_similarity(server: RunningServer, path: str) -> None:
    answer = rerank(server, path).json()
    assert answer["id"].startswith("rerank-")
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}  # "a" is computed once
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["results"][0] == {"index": 1, "relevance_score": pytest.approx(1), "document": {"text": "a"}}
    for result in answer["results"]:
        document = DOCUMENTS[result["index"]]
        assert result["document"] == {"text": document}
        assert result["relevance_score"] == pytest.approx(similarity(server, "a", document))


def test_fewer_results(server: RunningServer) -> None:
    results = rerank(server, top_n=2, return_documents=False).json()["results"]
    assert [set(result) for result in results] == [{"index", "relevance_score"}] * 2
    assert len(rerank(server, top_n=99).json()["results"]) == len(DOCUMENTS)


def test_documents_as_objects_and_shortened(server: RunningServer) -> None:
    results = rerank(server, documents=[{"text": "zzz"}, {"text": "azz"}], max_tokens_per_doc=1).json()["results"]
    assert [result["document"]["text"] for result in results] == ["azz", "zzz"]
    assert results[0]["relevance_score"] == pytest.approx(1)


def test_scores(server: RunningServer) -> None:
    one_to_many = score(server, text_1="a", text_2=DOCUMENTS).json()["data"]
    expected = [similarity(server, "a", document) for document in DOCUMENTS]
    assert [item["score"] for item in one_to_many] == pytest.approx(expected)
    pairs = score(server, text_1=["a", "b"], text_2=["b", "b"]).json()["data"]
    assert [item["score"] for item in pairs] == [pytest.approx(similarity(server, "a", "b")), pytest.approx(1)]
    assert [item["index"] for item in pairs] == [0, 1]


def test_a_reranker(start_server: StartServer) -> None:
    server = start_server(score_tokens="y,n", chat_template=None)
    answer = rerank(server, instruction="Find the letter")
    (*others, submit) = server.engine.submits
    assert len(others) == len(DOCUMENTS) - 1
    assert (submit.params.max_tokens, submit.params.temperature) == (1, 0.0)
    assert submit.params.logprob_token_ids == (ord("y"), ord("n"))
    prompt = server.model.tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False)
    assert "<Instruct>: Find the letter\n<Query>: a\n<Document>: z" in prompt
    assert 'can only be "y" or "n"' in prompt
    # The fake engine's log probabilities are -0.5 and -1.5.
    expected = math.exp(-0.5) / (math.exp(-0.5) + math.exp(-1.5))
    scores = [result["relevance_score"] for result in answer.json()["results"]]
    assert scores == [pytest.approx(expected)] * len(DOCUMENTS)
    assert "x-lightwell-warnings" not in answer.headers


def test_words_of_several_tokens(start_server: StartServer) -> None:
    with pytest.raises(ValueError, match="--score-tokens yes,no: expected two words that are one token each"):
        start_server(score_tokens="yes,no")  # the test model has a token per byte


def test_text_of_the_request_is_never_a_control_token(start_server: StartServer) -> None:
    server = start_server(score_tokens="y,n")
    ordinary, special = rerank(server, documents=["x"]), rerank(server, documents=["<|im_end|>"])
    assert ordinary.status_code == special.status_code == 200
    first, second = (submit.prompt_token_ids for submit in server.engine.submits[-2:])
    (end,) = server.model.tokenizer.special_ids_in(["<|im_end|>"]).values()
    assert first.count(end) == second.count(end) > 0


@pytest.mark.parametrize("score_tokens", [None, "y,n"])
def test_errors_name_the_text_that_is_too_long(start_server: StartServer, score_tokens: str | None) -> None:
    server = start_server(score_tokens=score_tokens)
    for path, *names in map(str.split, ("score text_1 text_2", "score queries documents", "rerank query documents")):
        for name, other in (names, names[::-1]):
            for num_chars in (5000, 5_000_000):
                error = check_error(clients.ask(server.url, f"/v1/{path}", **{name: "x" * num_chars, other: "a"}), 400)
                assert (error["param"], name in error["message"]) == (name, True)
    error = check_error(rerank(server, documents=["a", "b", "x" * 5000]), 400)
    assert (error["param"], error["code"]) == ("documents[2]", "context_length_exceeded")
    assert "maximum context length is 2048 tokens. However, your documents[2] resulted in 5" in error["message"]
    assert check_error(score(server, text_1=["a", "x" * 5000], text_2=["b", "c"]), 400)["param"] == "text_1[1]"
    assert rerank(server, documents=["a", "b", "x" * 5000], max_tokens_per_doc=1500).status_code == 200


def test_other_names_of_texts(server: RunningServer) -> None:
    expected = score(server, text_1="a", text_2=DOCUMENTS).json()["data"]
    answer = score(server, queries="a", documents=DOCUMENTS)
    assert answer.json()["data"] == expected
    assert "x-lightwell-warnings" not in answer.headers
    assert rerank(server, documents="b").json()["results"][0]["document"] == {"text": "b"}


def test_the_log_has_the_tokens_of_the_prompt_alone(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ask(server, ["Hello", "you"])
    fields = access_fields(caplog, PATH)
    assert fields["prompt_tokens"] > 0
    assert "completion_tokens" not in fields
