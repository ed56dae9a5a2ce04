"""Sampling with a real model: dialects, log probabilities, the best of several choices, and scores."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import StartServer
from tests.support.reference_model import load_reference
from tests.support.server_process import CHAT, COMPLETIONS, MODEL, ServerProcess


def complete(server: ServerProcess, prompt: str = "Once upon a time", **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 20, "seed": 3} | fields
    choice: dict[str, Any] = server.answer(COMPLETIONS, body)["choices"][0]
    return choice


@pytest.mark.checklist("C10")
def test_a_seed_that_was_reported_gives_the_same_answer(server: ServerProcess) -> None:
    body: dict[str, Any] = {"prompt": "Once", "max_tokens": 20, "temperature": 1.5}
    first = server.complete(**body, lightwell={"explain": True})
    seed = first.json()["lightwell"]["seed"]
    assert int(first.headers["x-lightwell-seed"]) == seed
    assert server.complete(**body, seed=seed).json()["choices"] == first.json()["choices"]


def test_dialects_agree(server: ServerProcess) -> None:
    """`tests/conformance` has the official clients."""
    system, question = "You answer in one short sentence.", {"role": "user", "content": "The capital of France? 🗼"}
    sampled = {"temperature": 0.8, "seed": 4}
    chat = server.answer(
        CHAT, sampled | {"messages": [{"role": "system", "content": system}, question], "max_tokens": 6}
    )
    fields = {"instructions": system, "input": [question], "max_output_tokens": 6}
    response = server.answer("/v1/responses", sampled | fields)
    message = server.answer("/v1/messages", sampled | {"system": system, "messages": [question], "max_tokens": 6})
    (text,) = message["content"]
    assert text["text"] == chat["choices"][0]["message"]["content"] == response["output"][0]["content"][0]["text"] != ""
    counted = server.answer("/v1/messages/count_tokens", {"system": system, "messages": [question]})["input_tokens"]
    assert chat["usage"]["prompt_tokens"] == response["usage"]["input_tokens"] == counted > 20
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted
    assert usage["output_tokens"] == response["usage"]["output_tokens"] == 6


def test_log_probabilities(server: ServerProcess) -> None:
    """Those of the prompt are those of an echo; and those of named tokens."""
    fields: dict[str, Any] = {"prompt": "The sky is blue and", "max_tokens": 1, "logprobs": 3}
    echo = complete(server, **fields, echo=True)["logprobs"]
    choice = complete(server, **fields, prompt_logprobs=3, return_token_ids=True)
    pairs = list(zip(choice["prompt_token_ids"][1:], choice["prompt_logprobs"][1:], strict=True))
    entries = [some[str(token_id)] for token_id, some in pairs]
    assert [entry["logprob"] for entry in entries] == echo["token_logprobs"][1:-1]
    assert [entry["decoded_token"] for entry in entries] == echo["tokens"][1:-1]
    for entry, (_, some) in zip(entries, pairs, strict=True):
        better = [other for other in some.values() if other["logprob"] > entry["logprob"]]
        assert entry["rank"] == len(better) + 1 or entry["rank"] > 3

    top = complete(server, logprobs=20, max_tokens=3, return_token_ids=True)
    ids = {*top["token_ids"], 5}
    named = complete(server, logprobs=20, max_tokens=3, logprob_token_ids=list(ids))["logprobs"]
    assert named["token_logprobs"] == top["logprobs"]["token_logprobs"]
    for index, (some, before) in enumerate(zip(named["top_logprobs"], top["logprobs"]["top_logprobs"], strict=True)):
        assert len(some) == len(ids)
        assert some[named["tokens"][index]] == named["token_logprobs"][index]
        assert all(some[token] == before[token] for token in some if token in before)


def test_best_of_returns_the_most_likely_choices(server: ServerProcess) -> None:
    fields: dict[str, Any] = {"prompt": ["Once upon a time", "The sky"], "max_tokens": 8, "seed": 5, "stop": ["."]}
    every = server.complete(**fields, n=4, logprobs=0).json()
    best = server.complete(**fields, n=2, best_of=4).json()

    def mean(choice: dict[str, Any]) -> float:
        return statistics.fmean(choice["logprobs"]["token_logprobs"])

    ranked = [sorted(every["choices"][first : first + 4], key=mean, reverse=True) for first in (0, 4)]
    expected = [choice["text"] for choices in ranked for choice in choices[:2]]
    assert [choice["text"] for choice in best["choices"]] == expected
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert [choice["logprobs"] for choice in best["choices"]] == [None] * 4
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"]


QUERY = "What is the capital of France?"
DOCUMENTS = ["Paris is the capital of France.", "Bread is made of flour and water.", "Rome lies in Italy."]
TOLERANCE = 0.06  # between packed weights with 8-bit activations and float32


@pytest.mark.long
def test_a_reranker_scores_as_transformers_does(start_server: StartServer, smollm2_path: Path) -> None:
    server = start_server("--score-tokens=yes,no")
    answer = server.http.post("/v1/rerank", json={"model": MODEL, "query": QUERY, "documents": DOCUMENTS})
    scores = {result["index"]: result["relevance_score"] for result in answer.json()["results"]}
    assert sorted(scores.values(), reverse=True) == list(scores.values())
    model = load_reference(smollm2_path)
    true, false = (server.answer("/tokenize", {"prompt": word})["tokens"][0] for word in ("yes", "no"))
    system = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".'
    )
    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    for index, document in enumerate(DOCUMENTS):
        text = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {QUERY}\n"
            f"<Document>: {document}<|im_end|>\n<|im_start|>assistant\n"
        )
        token_ids = server.answer("/tokenize", {"prompt": text})["tokens"]
        with torch.inference_mode():
            logits = model(torch.tensor([token_ids])).logits[0, -1]
        expected = torch.softmax(logits[[true, false]], dim=0)[0].item()
        assert scores[index] == pytest.approx(expected, abs=TOLERANCE)
