"""`POST /v1/rerank` and `/v1/score` with a fake engine, compared with `/v1/embeddings` of the same server."""

import math
from typing import Any

import httpx
import pytest

from tests.server.conftest import StartServer
from tests.support.serving import RunningServer, check_error

DOCUMENTS = ["bc", "a", "b", "ab", "z"]


def rerank(server: RunningServer, path: str = "/v1/rerank", **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "tiny", "query": "a", "documents": DOCUMENTS} | fields)


def score(server: RunningServer, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/score", json={"model": "tiny"} | fields)


def similarity(server: RunningServer, first: str, second: str) -> float:
    """Return the cosine similarity of two texts, by the API for embeddings."""
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": [first, second]}).json()
    one, other = (item["embedding"] for item in answer["data"])
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
    one_to_many = score(server, text_1="a", text_2=DOCUMENTS).json()
    assert [item["score"] for item in one_to_many["data"]] == [
        pytest.approx(similarity(server, "a", document)) for document in DOCUMENTS
    ]
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
    for names, ask in (
        (("text_1", "text_2"), score),
        (("queries", "documents"), score),
        (("query", "documents"), rerank),
    ):
        for name, other in (names, names[::-1]):
            for num_chars in (5000, 5_000_000):
                texts: dict[str, Any] = {name: "x" * num_chars, other: "a"}
                error = check_error(ask(server, **texts), 400)
                assert error["param"] == name
                assert name in error["message"]
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
