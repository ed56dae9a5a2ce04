"""Sampling with a real model: each setting has its effect, defaults are those of the model's card, and scores."""

import concurrent.futures
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.package_aliases import PACKAGE_ALIASES
from tests.e2e.conftest import StartServer
from tests.support.reference_model import load_reference
from tests.support.server_process import CHAT, COMPLETIONS, MODEL, ServerProcess, running_server

REPEAT = "One fish swims home. " * 3 + "One fish"
CARD = dict(PACKAGE_ALIASES[MODEL].card_sampling)


def complete(server: ServerProcess, prompt: str = "Once upon a time", **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = server.complete(**{"prompt": prompt, "max_tokens": 20, "seed": 3} | fields).json()
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def test_settings_have_their_effect(server: ServerProcess) -> None:
    """Each is reproducible. The engine's own tests have their distributions."""
    plain = complete(server, temperature=1.5)["text"]
    fields: dict[str, Any]
    for fields in (
        {"typical_p": 0.1},
        {"top_n_sigma": 0.5},
        {"xtc_probability": 1, "xtc_threshold": 0.01},
        {"mirostat": 2, "mirostat_tau": 1},
        {"samplers": ["top_k"], "temperature": 0.5},
        {"allowed_token_ids": [216, 260, 282, 338]},
    ):
        text = complete(server, **{"temperature": 1.5} | fields)["text"]
        assert text != plain, fields
        assert complete(server, **{"temperature": 1.5} | fields)["text"] == text, fields
    greedy: dict[str, Any] = {"prompt": REPEAT, "temperature": 0}
    for fields, repeats in (
        ({}, True),
        ({"dry_multiplier": 100}, False),
        ({"dry_multiplier": 100, "dry_sequence_breakers": [" fish", " swims"]}, True),
        ({"repetition_penalty": 10}, False),
        ({"repetition_penalty": 10, "repeat_last_n": 1}, True),
        ({"bad_words": [" swims"]}, False),
    ):
        assert complete(server, **greedy, **fields)["text"].startswith(" swims home.") == repeats, fields
    detection: Any = {"max_pattern_size": 10, "min_pattern_size": 3, "min_count": 2}
    forced: dict[str, Any] = {"temperature": 0, "logit_bias": {"260": 100}, "return_token_ids": True}
    for more, num_tokens, reason in (({}, 20, "length"), ({"repetition_detection": detection}, 6, "repetition")):
        choice = complete(server, **forced, **more)
        assert (choice["token_ids"], choice["finish_reason"]) == ([260] * num_tokens, reason)


def test_log_probabilities(server: ServerProcess) -> None:
    """After sampling, those left by top_k add up to 1; those of the prompt are those of an echo; and named tokens."""
    fields: dict[str, Any] = {"top_k": 3, "logprobs": 5, "temperature": 0.7}
    own, after = complete(server, **fields), complete(server, **fields, post_sampling_probs=True)
    assert own["text"] == after["text"]
    for before, some in zip(own["logprobs"]["top_logprobs"], after["logprobs"]["top_logprobs"], strict=True):
        assert sum(map(math.exp, some.values())) == pytest.approx(1, abs=1e-5)
        assert list(some) == list(before)[:3]

    fields = {"prompt": "The sky is blue and", "max_tokens": 1, "logprobs": 3}
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
        logprobs: list[float] = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    ranked = [sorted(every["choices"][first : first + 4], key=mean, reverse=True) for first in (0, 4)]
    expected = [choice["text"] for choices in ranked for choice in choices[:2]]
    assert [choice["text"] for choice in best["choices"]] == expected
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert [choice["logprobs"] for choice in best["choices"]] == [None] * 4
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"]


@pytest.fixture(scope="module")
def card_server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """A server whose default sampling is that of the alias: its file is given as a path, which has no card."""
    flags = ("--max-model-len=2048", "--kv-cache-memory=128MiB", "--record-requests=10")
    with running_server(smollm2_path, *flags, f"--default-sampling={json.dumps(CARD)}") as server:
        yield server


@pytest.mark.long
def test_defaults_give_the_bits_of_the_same_fields(card_server: ServerProcess, server: ServerProcess) -> None:
    """Whether the request sends them to this server or to one without default sampling. They are replayed, too."""
    fields: dict[str, Any] = {"max_tokens": 24, "seed": 5}
    for path, body in (
        (COMPLETIONS, fields | {"prompt": "Once upon a time", "logprobs": 3, "n": 2}),
        (CHAT, fields | {"messages": [{"role": "user", "content": "Hi!"}], "logprobs": True}),
    ):
        default = card_server.answer(path, body)
        explicit, elsewhere = card_server.answer(path, body | CARD), server.answer(path, body | CARD)
        assert default["choices"] == explicit["choices"] == elsewhere["choices"]
        assert default["choices"] != card_server.answer(path, body | {"temperature": 1})["choices"]
        assert default["system_fingerprint"].startswith(elsewhere["system_fingerprint"] + "-")
        replay = card_server.http.post(f"/v1/requests/{default['id']}/replay").json()
        assert replay["bit_equal"], replay


@pytest.mark.long
def test_hello_is_answered_with_every_seed(card_server: ServerProcess) -> None:
    """The answer ends by itself, soon, and is made of words. At temperature 1 that holds for 35 of 50 seeds."""

    def hello(seed: int) -> dict[str, Any]:
        return card_server.answer(CHAT, {"messages": [{"role": "user", "content": "hello"}], "seed": seed})

    word = re.compile(r"\W*[A-Za-z][A-Za-z'’-]*\W*|[\d\W]+")
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(hello, range(50)))
    for seed, answer in enumerate(answers):
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "stop", (seed, choice)
        assert answer["usage"]["completion_tokens"] <= 100, (seed, choice)
        words = choice["message"]["content"].split()
        assert words, seed
        assert [each for each in words if not word.fullmatch(each)] == [], (seed, choice)


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
    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    system = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".'
    )
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


def test_similar_texts_have_a_higher_score(server: ServerProcess) -> None:
    answer = server.answer("/v1/score", {"text_1": QUERY, "text_2": [QUERY, *DOCUMENTS]})
    scores = [item["score"] for item in answer["data"]]
    assert scores[0] == pytest.approx(1)
    assert scores[1] == max(scores[1:])
